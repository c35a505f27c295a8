"""Exchange of weights and settings with Hugging Face's LlamaForCausalLM.

Names map one to one. Two things differ beside names:

- Rotary pairs. Octavo turns components (2i, 2i+1) of a head, Hugging Face (i, i + Dh/2). Rows of wq
  and wk are therefore permuted within each head: row ``j Dh/2 + i`` there is row ``2i + j`` here
  (i < Dh/2, j in {0, 1}).
- Tying. Hugging Face leaves ``lm_head.weight`` out of the file where it is the embedding's.

`to_hf` and `from_hf` map one tensor at a time, so that a checkpoint larger than memory can be
streamed; `from_hf` also takes some rows of one, whole blocks of `row_block`. Nothing is read from or
written to disk here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from models.llama3.config import Llama3Config

if TYPE_CHECKING:
    from torch import Tensor

_TO_HF = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FROM_HF = {hf_name: name for name, hf_name in _TO_HF.items()}


def hf_names(config: Llama3Config) -> dict[str, str]:
    """Every tensor of a checkpoint: Octavo name -> Hugging Face name (no output where it is tied).

    In the order of the forward pass: embedding, layer by layer, norm, output.
    """
    in_layer = {name: hf_name for name, hf_name in _TO_HF.items() if "*" in name}
    names = {"tok_embeddings.weight": _TO_HF["tok_embeddings.weight"]}
    for i in range(config.n_layers):
        names.update({name.replace("*", str(i)): hf.replace("*", str(i)) for name, hf in in_layer.items()})
    ends = ["norm.weight"] if config.tied_output else ["norm.weight", "output.weight"]
    names.update({name: _TO_HF[name] for name in ends})
    return names


def shapes(config: Llama3Config) -> dict[str, tuple[int, ...]]:
    """Octavo name -> shape, of all that `hf_names` names."""
    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    by_pattern: dict[str, tuple[int, ...]] = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "tok_embeddings": (config.vocab_size, dim),
        "output": (config.vocab_size, dim),
    }
    found = {}
    for name in hf_names(config):
        module = re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")
        found[name] = by_pattern.get(module, (dim,))  # the rest are norms
    return found


def row_block(config: Llama3Config, name: str) -> int:
    """Rows of `name` that are permuted among themselves: a head's; 1 where none are."""
    return config.head_dim if _is_rotated(name) else 1


def to_hf(config: Llama3Config, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """Map one tensor to Hugging Face's name and row order.

    Returns:
        (name, tensor), or None for the output where it is tied: the embedding stands for it.

    Raises:
        ValueError: the model has no tensor of this name.
    """
    hf_name = _rename(name, _TO_HF)
    if name == "output.weight" and config.tied_output:
        return None
    if _is_rotated(name):
        # rows (head, i, j) -> (head, j, i)
        tensor = tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return hf_name, tensor


def from_hf(config: Llama3Config, hf_name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """Map one tensor of a Hugging Face checkpoint, or whole heads of one, to Octavo's name and row order.

    Returns:
        (name, tensor), or None for what Octavo does not store: an output that is tied, and the
        rotary frequencies of old exports.

    Raises:
        ValueError: LlamaForCausalLM has no tensor of this name.
    """
    if is_unused(config, hf_name):
        return None
    name = _rename(hf_name, _FROM_HF)
    if _is_rotated(name):
        # rows (head, j, i) -> (head, i, j)
        tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return name, tensor


def is_unused(config: Llama3Config, hf_name: str) -> bool:
    """Whether a Hugging Face checkpoint may have this tensor and Octavo has no use for it."""
    is_tied = config.tied_output and hf_name == _TO_HF["output.weight"]
    return is_tied or hf_name.endswith(".rotary_emb.inv_freq")


def hf_config(config: Llama3Config) -> dict[str, Any]:
    """The content of ``config.json`` for an export. Token ids and dtype are the exporter's to add."""
    scaling = None
    if config.rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_seq_len,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied_output,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_from_hf(hf: Mapping[str, Any]) -> Llama3Config:
    """Read the content of a ``config.json``.

    Accepts `rope_theta` and `rope_scaling` at the top level (transformers 4 and the published
    checkpoints) and under `rope_parameters` (transformers 5).

    Raises:
        ValueError: it is malformed, not a Llama, or it uses what `Llama3` does not have.
    """
    _check_supported(hf)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_scaling is {rope!r}; it must be an object")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported; allowed: default, llama3")
    scaling: dict[str, Any] = {}
    if rope_type == "llama3":
        scaling = {
            "rope_scaling_factor": _number(rope, "factor"),
            "rope_low_freq_factor": _number(rope, "low_freq_factor"),
            "rope_high_freq_factor": _number(rope, "high_freq_factor"),
            "rope_original_seq_len": _size(rope, "original_max_position_embeddings"),
        }
    theta = rope if rope.get("rope_theta") is not None else hf
    return Llama3Config(
        dim=_size(hf, "hidden_size"),
        n_layers=_size(hf, "num_hidden_layers", most=10_000),
        n_heads=_size(hf, "num_attention_heads"),
        n_kv_heads=_size(hf, "num_key_value_heads", hf["num_attention_heads"]),
        vocab_size=_size(hf, "vocab_size"),
        ffn_hidden_dim=_size(hf, "intermediate_size"),
        norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        tied_output=_flag(hf, "tie_word_embeddings"),
        max_seq_len=_size(hf, "max_position_embeddings", 2048),
        rope_theta=_number(theta, "rope_theta", 10000.0),
        rope_scaling=bool(scaling),
        **scaling,
    )


def overrides(config: Llama3Config, flavor: Llama3Config) -> dict[str, Any]:
    """Fields of `config` to set on `flavor` so that it becomes the same model; idle ones are left out."""
    idle = {"max_seq_len", "attn_mask_type", "multiple_of", "ffn_dim_multiplier"}
    idle |= {"attn_backend", "swiglu_kernel", "norm_kernel", "rope_kernel"}
    if config.hidden_dim == flavor.hidden_dim:
        idle.add("ffn_hidden_dim")
    if not config.rope_scaling:
        idle |= {
            "rope_scaling_factor",
            "rope_low_freq_factor",
            "rope_high_freq_factor",
            "rope_original_seq_len",
        }
    pairs = {f.name: (getattr(config, f.name), getattr(flavor, f.name)) for f in fields(config)}
    return {name: mine for name, (mine, other) in pairs.items() if name not in idle and mine != other}


def _check_supported(hf: Mapping[str, Any]) -> None:
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    expected["partial_rotary_factor"] = 1.0
    for key, value in expected.items():
        got = hf.get(key, value)
        if got != value:
            raise ValueError(f"config.json: {key} is {got!r}; only {value!r} is supported")
    if hf.get("quantization_config") is not None:
        raise ValueError(
            "config.json: quantization_config is set; quantized weights are not supported, use the original"
        )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in sizes if hf.get(key) is None]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    width = _size(hf, "hidden_size") // _size(hf, "num_attention_heads")
    head_dim = _size(hf, "head_dim", width)
    if head_dim != width:
        raise ValueError(
            f"config.json: head_dim is {head_dim}; only hidden_size / heads ({width}) is supported"
        )


def _size(values: Mapping[str, Any], key: str, default: Any = None, most: int = 2**24) -> int:
    value = default if values.get(key) is None else values[key]
    # The bound keeps what is derived from a hostile file (a list of layers, say) small.
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a whole number from 1 to {most:,}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a positive number")
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}; it must be true or false")
    return value


def _rename(name: str, table: Mapping[str, str]) -> str:
    layer = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    pattern = name if layer is None else name[: layer.start()] + "*" + name[layer.end() :]
    if pattern not in table:
        raise ValueError(f"unknown tensor {name!r} in a Llama checkpoint")
    renamed = table[pattern]
    return renamed if layer is None else renamed.replace("*", layer.group())


def _is_rotated(name: str) -> bool:
    """Whether RoPE turns what comes out of this weight, so that its rows are permuted."""
    return name.endswith((".attention.wq.weight", ".attention.wk.weight"))
