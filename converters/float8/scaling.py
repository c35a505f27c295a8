"""Scale and cast, as the float8 converter sees them: `kernels.scaling`, and what a GEMM does with a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.scaling import (
    MIN_AMAX,
    cast_to_float8,
    compute_amax,
    float8_max,
    round_down_to_power_of_2,
    scale_from_amax,
)

__all__ = [
    "MIN_AMAX",
    "cast_to_float8",
    "compute_amax",
    "dequantize",
    "float8_max",
    "inverse_scale",
    "round_down_to_power_of_2",
    "scale_from_amax",
]


def inverse_scale(scale: Tensor) -> Tensor:
    """fp32(1 / s): what a scaled GEMM multiplies its product by."""
    return torch.reciprocal(scale.to(torch.float64)).to(torch.float32)


def dequantize(x_fp8: Tensor, scale: Tensor) -> Tensor:
    """x8 / s in fp32: the value that a float8 element stands for."""
    return x_fp8.to(torch.float32) / scale
