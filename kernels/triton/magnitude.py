"""The largest magnitude of what many programs see, as the bits of |x| in fp32.

As integers they are ordered as the numbers are, with every NaN above infinity: so an integer maximum, and
atomics on it in whatever order, keep a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """Bits of |x| in fp32, int32."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_amax(amax, values):
    """Make the number whose bits `amax` (int32) points at no smaller than any |value| of a block, or NaN."""
    tl.atomic_max(amax, tl.max(magnitude(values), axis=0), sem="relaxed")
