"""Scales, and what GEMMs multiply by, inside kernels: `kernels.scaling` to the last bit.

An fp64 division takes some tens of instructions: once a program or a row it is hidden behind memory, once an
element it is not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(bits, fmax: tl.constexpr, power_of_2: tl.constexpr):
    """`kernels.scaling.scale_from_amax` of the bits of an amax."""
    wide = bits.to(tl.float32, bitcast=True).to(tl.float64)
    # tl.full, because a bare literal is rounded to fp32 first.
    least = tl.full(wide.shape, 1e-12, tl.float64)
    wide = tl.where(wide < least, least, wide)
    scale = (tl.full(wide.shape, fmax, tl.float64) / wide).to(tl.float32)
    if power_of_2:
        wide = scale.to(tl.float64)
        exponent = wide.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        scale = tl.where(wide != wide, wide, exponent.to(tl.float64, bitcast=True)).to(tl.float32)
    return scale


@triton.jit
def inverse_of(scale):
    """`kernels.scaling.inverse_scale`: fp32(1 / s)."""
    return (tl.full(scale.shape, 1.0, tl.float64) / scale.to(tl.float64)).to(tl.float32)
