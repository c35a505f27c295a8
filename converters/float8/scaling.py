"""Scale and cast, as the float8 converter sees them.

`kernels.scaling` is the arithmetic; here is who carries it out (`cast_kernels`), and what a GEMM does with a
scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cast
from kernels.scaling import (
    MIN_AMAX,
    cast_to_float8,
    compute_amax,
    float8_max,
    inverse_scale,
    round_down_to_power_of_2,
    scale_from_amax,
)

__all__ = [
    "MIN_AMAX",
    "amax_of",
    "cast_to_float8",
    "cast_with_scale",
    "cast_with_scale_into",
    "compute_amax",
    "dequantize",
    "float8_max",
    "inverse_scale",
    "round_down_to_power_of_2",
    "scale_from_amax",
]


def amax_of(t: Tensor, cast_kernels: str) -> Tensor:
    """Max |t| as a scalar of t's dtype.

    A compiler folds the reduction into the kernel that makes t where it can, so it gets PyTorch's form.
    """
    if cast_kernels == "triton" and not torch.compiler.is_compiling():
        return cast.amax(t)
    return compute_amax(t)


def cast_with_scale(t: Tensor, scale: Tensor, dtype: torch.dtype, cast_kernels: str) -> Tensor:
    """T8 of t's shape (any)."""
    if cast_kernels == "triton":
        return cast.cast_float8(t, scale, dtype)
    return cast_to_float8(t, scale, dtype)


def cast_with_scale_into(out: Tensor, t: Tensor, scale: Tensor, cast_kernels: str) -> None:
    """T8 of t's shape, written to `out`, which is contiguous."""
    if cast_kernels == "triton":
        cast.cast_float8_into(out, t, scale)
    else:
        out.copy_(cast_to_float8(t, scale, out.dtype))


def dequantize(x_fp8: Tensor, scale: Tensor) -> Tensor:
    """x8 / s in fp32: the value that a float8 element stands for."""
    return x_fp8.to(torch.float32) / scale
