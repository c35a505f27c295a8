"""Rotary position embedding (RoPE) on interleaved pairs, with the wavelength scaling of Llama 3.1.

Components 2i and 2i+1 of a head at position p are one point of the plane, turned by the angle
``p * f_i`` with ``f_i = theta^(-2i / Dh)`` (Su et al. 2021, arXiv 2104.09864, section 3.4.2)::

    y[2i]   = x[2i] cos(p f_i) - x[2i+1] sin(p f_i)
    y[2i+1] = x[2i] sin(p f_i) + x[2i+1] cos(p f_i)

This is the pairing of Meta's checkpoints. Hugging Face pairs i with i + Dh/2 instead, which permutes
rows of wq and wk (`models/llama3/huggingface.py`).

No complex numbers: real tables fuse in the compiler and work where tensors are sharded. `kernels/rope.py`
turns the pairs, by PyTorch's operations or in one kernel each way.

Legend: B sequences, S positions, H heads, Dh head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.rope import rotate, rotate_pairs


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's change of the rotary wavelengths, so that a model reads longer sequences."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_seq_len: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair, (Dh/2,) in fp32.

    With `scaling`, wavelengths longer than ``original_seq_len / low_freq_factor`` grow by `factor`,
    those shorter than ``original_seq_len / high_freq_factor`` stay, and between them the frequency is
    interpolated linearly in (original_seq_len / wavelength).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)  # full turns over the original length
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by their positions, from fp32 tables that are never in a checkpoint.

    One instance is shared by all blocks of a model (a submodule of each), so the tables exist once
    and blocks take no floating-point argument that FSDP's mixed precision would cast to bf16. The
    tables are a function of the settings: whatever moves, casts or re-allocates the module, they are
    built anew on its device, in fp32. `fused` turns pairs in one kernel, to the values that PyTorch's
    operations give one by one.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int,
        theta: float,
        scaling: RopeScaling | None = None,
        fused: bool = False,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        self.scaling = scaling
        self.fused = fused
        self._positions: Tensor | None = None
        self._fill(torch.get_default_device())

    def rebuild(self) -> None:
        """Fill the tables on the device they are on."""
        self._fill(self.cos.device)

    def set_positions(self, positions: Tensor | None) -> None:
        """Choose which positions the rows of an input stand for.

        Args:
            positions: the global position of each row, (S,) int64: under context parallelism, of the
                rows that this rank holds. None: row i is position i, up to max_seq_len.
        """
        self._positions = None if positions is None else positions.detach().cpu()
        self.rebuild()

    @property
    def positions(self) -> Tensor | None:
        """What `set_positions` was given, on the CPU."""
        return self._positions

    def forward(self, x: Tensor) -> Tensor:
        """Turn x: (B, S, H, Dh) by the positions of its S rows; same shape and dtype."""
        length, rows = x.shape[1], self.cos.shape[0]
        if length > rows or (self._positions is not None and length != rows):
            raise ValueError(
                f"the RoPE table has {rows} positions, the input {length}; max_seq_len sets them"
            )
        if self.fused:
            return rotate_pairs(x, self.cos, self.sin, False, False)[0]
        return rotate(x, self.cos[:length, None, :], self.sin[:length, None, :])

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        sizes = f"head_dim={self.head_dim}, max_seq_len={self.max_seq_len}"
        return f"{sizes}, theta={self.theta:g}, scaling={self.scaling}, fused={self.fused}"

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":
            rows = self.max_seq_len if self._positions is None else len(self._positions)
            angles = torch.empty(rows, self.head_dim // 2, device=device)
        else:
            positions = self._positions
            if positions is None:
                positions = torch.arange(self.max_seq_len, device="cpu")
            frequencies = rope_frequencies(self.head_dim, self.theta, self.scaling)
            angles = torch.outer(positions.float(), frequencies)
        self.register_buffer("cos", angles.cos().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self.rebuild()
        return self
