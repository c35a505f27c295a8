"""Scale and cast: the arithmetic that every float8 recipe, and every float8 kernel, rests on.

    amax  = max |x|                                    in x's own dtype
    s     = fp32( fmax / max(fp64(amax), 1e-12) )      fmax: largest finite value of the float8 format
    s    <- 2^floor(log2 s)                            where scales are powers of two
    x8    = to_float8( clamp( fp32(x) * s, -fmax, fmax ) )
    x    ~= x8 / s                                     GEMMs multiply by fp32(1 / s)

The divisions run in fp64 and are then rounded once: a compiler's fp32 division may be off by an ulp,
an fp64 one rounded to fp32 is not (53 >= 2 * 24 + 2 bits, so rounding twice is harmless). Eager and
compiled scales are therefore equal to the last bit.

The clamp is explicit, because casts saturate or overflow as the dtype and the device like. A NaN
stays NaN; an inf gives s = 0, hence NaN; an all-zero tensor gives s = fmax / 1e-12, hence zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_AMAX = 1e-12
"""Floor of amax, so that an all-zero tensor has a finite scale."""

_FP64_EXPONENT_BITS = 0x7FF0000000000000


def float8_max(dtype: torch.dtype) -> float:
    """Largest finite value of a float8 format: 448 for e4m3fn, 57344 for e5m2, 240 for e4m3fnuz."""
    return torch.finfo(dtype).max


def compute_amax(x: Tensor, dim: int | None = None) -> Tensor:
    """Max |x| in x's dtype: a scalar, or over `dim`, which is kept with size 1. Of nothing it is 0."""
    if x.numel() == 0:
        shape = list(x.shape) if dim is not None else []
        if dim is not None:
            shape[dim] = 1
        return x.new_zeros(shape)
    if dim is None:
        return torch.amax(torch.abs(x))
    return torch.amax(torch.abs(x), dim=dim, keepdim=True)


def round_down_to_power_of_2(s: Tensor) -> Tensor:
    """2^floor(log2 s) for fp32 s >= 0, exactly: inf, NaN and zero stay, subnormals are rounded like others.

    The mantissa is cleared rather than log2 computed: an fp32 log2 of a value just under a power of
    two rounds up to it. It is cleared in fp64, where fp32's subnormals are normal numbers.
    """
    wide = s.to(torch.float64)
    rounded = (wide.view(torch.int64) & _FP64_EXPONENT_BITS).view(torch.float64)
    return torch.where(torch.isnan(wide), wide, rounded).to(torch.float32)


def scale_from_amax(amax: Tensor, dtype: torch.dtype, round_to_power_of_2: bool = False) -> Tensor:
    """The fp32 scale that maps `amax` to the largest value of float8 `dtype`."""
    wide = torch.clamp(amax.to(torch.float64), min=MIN_AMAX)
    # A true division: `number / tensor` would multiply by a reciprocal, which rounds twice.
    scale = torch.div(torch.full_like(wide, float8_max(dtype)), wide).to(torch.float32)
    return round_down_to_power_of_2(scale) if round_to_power_of_2 else scale


def cast_to_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturating cast of x * scale to float8 `dtype`; the product is taken in fp32."""
    fmax = float8_max(dtype)
    return torch.clamp(x.to(torch.float32) * scale, -fmax, fmax).to(dtype)


def inverse_scale(scale: Tensor) -> Tensor:
    """fp32(1 / s): what a scaled GEMM multiplies its product by."""
    return torch.reciprocal(scale.to(torch.float64)).to(torch.float32)
