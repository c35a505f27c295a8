"""Exchange of weights and settings with Hugging Face's LlamaForCausalLM.

Names map one to one. Two things differ beside names:

- Rotary pairs. Octavo turns components (2i, 2i+1) of a head, Hugging Face (i, i + Dh/2). Rows of wq
  and wk are therefore permuted within each head: row ``j Dh/2 + i`` there is row ``2i + j`` here
  (i < Dh/2, j in {0, 1}).
- Tying. Hugging Face leaves ``lm_head.weight`` out of the file where it is the embedding's.

`to_hf` and `from_hf` map one tensor at a time, so that a checkpoint larger than memory can be
streamed. Nothing is read from or written to disk here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    """Every tensor of a checkpoint: Octavo name -> Hugging Face name (no output where it is tied)."""
    names = {}
    for name, hf_name in _TO_HF.items():
        if name == "output.weight" and config.tied_output:
            continue
        layers = range(config.n_layers) if "*" in name else [0]
        names.update({name.replace("*", str(i)): hf_name.replace("*", str(i)) for i in layers})
    return names


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
    heads = _permuted_heads(config, name)
    if heads:
        # rows (head, i, j) -> (head, j, i)
        tensor = tensor.unflatten(0, (heads, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return hf_name, tensor


def from_hf(config: Llama3Config, hf_name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """Map one tensor of a Hugging Face checkpoint to Octavo's name and row order.

    Returns:
        (name, tensor), or None for what Octavo does not store: an output that is tied, and the
        rotary frequencies of old exports.

    Raises:
        ValueError: LlamaForCausalLM has no tensor of this name.
    """
    if hf_name.endswith(".rotary_emb.inv_freq"):
        return None
    name = _rename(hf_name, _FROM_HF)
    if name == "output.weight" and config.tied_output:
        return None
    heads = _permuted_heads(config, name)
    if heads:
        # rows (head, j, i) -> (head, i, j)
        tensor = tensor.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return name, tensor


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
        ValueError: it is not a Llama, or it uses what `Llama3` does not have.
    """
    _check_supported(hf)
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"config.json: rope type {rope_type!r} is not supported; allowed: default, llama3")
    scaling = {}
    if rope_type == "llama3":
        scaling = {
            "rope_scaling_factor": float(rope["factor"]),
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
            "rope_original_seq_len": rope["original_max_position_embeddings"],
        }
    return Llama3Config(
        dim=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        ffn_hidden_dim=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_output=hf.get("tie_word_embeddings", False),
        max_seq_len=hf.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_scaling=bool(scaling),
        **scaling,
    )


def _check_supported(hf: Mapping[str, Any]) -> None:
    expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in expected.items():
        got = hf.get(key, value)
        if got != value:
            raise ValueError(f"config.json: {key} is {got!r}; only {value!r} is supported")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in sizes if key not in hf]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    width = hf["hidden_size"] // hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or width
    if head_dim != width:
        raise ValueError(
            f"config.json: head_dim is {head_dim}; only hidden_size / heads ({width}) is supported"
        )


def _rename(name: str, table: Mapping[str, str]) -> str:
    layer = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    pattern = name if layer is None else name[: layer.start()] + "*" + name[layer.end() :]
    if pattern not in table:
        raise ValueError(f"unknown tensor {name!r} in a Llama checkpoint")
    renamed = table[pattern]
    return renamed if layer is None else renamed.replace("*", layer.group())


def _permuted_heads(config: Llama3Config, name: str) -> int:
    """Heads in the rows of `name` that are turned by RoPE; 0 for a weight that is not."""
    if name.endswith(".attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith(".attention.wk.weight") else 0
