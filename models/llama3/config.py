"""The architecture of Llama 3 as plain data: fields, published sizes, and checks. No torch here.

Flavors follow the published models: 8B, 70B and 405B are Llama 3.1, 1B and 3B are Llama 3.2
(Grattafiori et al. 2024, arXiv 2407.21783, and the models' own published settings). `debugmodel`
trains on a laptop.

The feed-forward width follows Llama's rule: two thirds of 4 x dim (a gated FFN has three matrices
where a plain one has two), times a multiplier, rounded up to a multiple.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.spec import FlopInputs


@dataclass(frozen=True)
class Llama3Config:
    """Sizes and choices of one Llama 3 model."""

    dim: int = 4096
    """Width of the residual stream."""
    n_layers: int = 32
    """Number of transformer blocks."""
    n_heads: int = 32
    """Query heads; a head is dim / n_heads wide."""
    n_kv_heads: int = 8
    """Key and value heads, each shared by n_heads / n_kv_heads query heads."""
    vocab_size: int = 128256
    """Rows of the token embedding and of the output."""
    multiple_of: int = 1024
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float = 1.0
    """Factor on the feed-forward width of 8/3 x dim, before rounding."""
    ffn_hidden_dim: int | None = None
    """Feed-forward width. Set, it takes the place of the rule made by multiple_of and ffn_dim_multiplier."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied_output: bool = False
    """The output uses the token embedding's weight. Cannot be split into pipeline stages."""
    max_seq_len: int = 8192
    """Positions in the RoPE table. The trainer sets it to training.seq_len."""
    rope_theta: float = 500000.0
    """Base of the rotary wavelengths."""
    rope_scaling: bool = True
    """Stretch long rotary wavelengths as Llama 3.1 does."""
    rope_scaling_factor: float = 8.0
    """How far the longest wavelengths are stretched."""
    rope_low_freq_factor: float = 1.0
    """Wavelengths above rope_original_seq_len / this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths below rope_original_seq_len / this stay as they are."""
    rope_original_seq_len: int = 8192
    """Sequence length that the unscaled wavelengths were made for."""
    attn_mask_type: Literal["causal", "document"] = "causal"
    """``causal``: a position sees all before it. ``document``: only those of its own document."""
    attn_backend: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    """Kernel of causal attention on CUDA; ``auto`` takes the first of the others that fits, in this order."""
    swiglu_kernel: Literal["torch", "fused"] = "torch"
    """The feed-forward's product: PyTorch's operations, or one kernel that keeps nothing but its inputs."""
    norm_kernel: Literal["torch", "fused"] = "torch"
    """RMSNorm: PyTorch's, or a kernel that also adds to the residual stream. Not with tensor parallelism."""
    rope_kernel: Literal["torch", "fused"] = "torch"
    """Rotary embedding of queries and keys: PyTorch's operations, or one kernel each way."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Feed-forward width: ffn_hidden_dim, or Llama's rule."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        width = int(self.ffn_dim_multiplier * (8 * self.dim // 3))
        return -(-width // self.multiple_of) * self.multiple_of


FLAVORS: dict[str, Llama3Config] = {
    "debugmodel": Llama3Config(
        dim=256, n_layers=6, n_heads=16, n_kv_heads=16, vocab_size=2048, multiple_of=256, rope_scaling=False
    ),
    "1B": Llama3Config(
        dim=2048,
        n_layers=16,
        multiple_of=256,
        ffn_dim_multiplier=1.5,
        tied_output=True,
        rope_scaling_factor=32.0,
    ),
    "3B": Llama3Config(
        dim=3072, n_layers=28, n_heads=24, multiple_of=256, tied_output=True, rope_scaling_factor=32.0
    ),
    "8B": Llama3Config(ffn_dim_multiplier=1.3),
    "70B": Llama3Config(dim=8192, n_layers=80, n_heads=64, multiple_of=4096, ffn_dim_multiplier=1.3),
    "405B": Llama3Config(dim=16384, n_layers=126, n_heads=128, multiple_of=4096, ffn_dim_multiplier=1.2),
}
"""The published sizes and one to debug with."""


def flop_inputs(config: Llama3Config) -> FlopInputs:
    """Count parameters and name the sizes of the FLOP formula, from the config alone."""
    embedding = config.vocab_size * config.dim
    attention = 2 * config.dim * config.head_dim * (config.n_heads + config.n_kv_heads)
    feed_forward = 3 * config.dim * config.hidden_dim
    block = attention + feed_forward + 2 * config.dim
    output = 0 if config.tied_output else embedding
    return FlopInputs(
        parameters=embedding + config.n_layers * block + config.dim + output,
        embedding_parameters=embedding,
        tied_output=config.tied_output,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        head_dim=config.head_dim,
    )


def problems(config: Llama3Config) -> list[tuple[str, str]]:
    """Everything that keeps `config` from being built, as (field, message); empty if nothing does."""
    found = _not_positive(config)
    if found:
        return found  # the divisions below need positive sizes
    if config.dim % config.n_heads:
        found.append(("n_heads", f"must divide dim ({config.dim}), got {config.n_heads}"))
    elif config.head_dim % 2:
        found.append(
            ("n_heads", f"dim / n_heads must be even for rotary pairs, got {config.dim} / {config.n_heads}")
        )
    if config.n_heads % config.n_kv_heads:
        found.append(("n_kv_heads", f"must divide n_heads ({config.n_heads}), got {config.n_kv_heads}"))
    if config.rope_theta <= 1:
        found.append(("rope_theta", f"must be above 1, got {config.rope_theta:g}"))
    if config.rope_scaling:
        found += _rope_scaling_problems(config)
    if config.attn_mask_type == "document" and config.attn_backend != "auto":
        found.append(
            (
                "attn_backend",
                f"{config.attn_backend!r} has no effect with attn_mask_type 'document'; use 'auto'",
            )
        )
    return found


def _not_positive(config: Llama3Config) -> list[tuple[str, str]]:
    fields = [
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "ffn_hidden_dim",
        "norm_eps",
        "max_seq_len",
        "rope_theta",
    ]
    values = [(name, getattr(config, name)) for name in fields]
    return [
        (name, f"must be positive, got {value}")
        for name, value in values
        if value is not None and not value > 0
    ]


def _rope_scaling_problems(config: Llama3Config) -> list[tuple[str, str]]:
    found = []
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if not config.rope_scaling_factor >= 1:
        found.append(("rope_scaling_factor", f"must be at least 1, got {config.rope_scaling_factor:g}"))
    if not low > 0:
        found.append(("rope_low_freq_factor", f"must be positive, got {low:g}"))
    if not high > low:
        found.append(("rope_high_freq_factor", f"must be above rope_low_freq_factor ({low:g}), got {high:g}"))
    if config.rope_original_seq_len <= 0:
        found.append(("rope_original_seq_len", f"must be positive, got {config.rope_original_seq_len}"))
    return found
