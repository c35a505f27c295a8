"""The amax of a tensor that nothing else gives, in Triton, for a cast that follows at once.

`amax_kernel`: as many programs as fit on the chip stride over x, and each writes the amax of its part.

A cast reads again what its amax has read, and L2 (50 MB of an H100) can hold the end of it. So the amax goes
from the first element to the last, tells L2 to let go of what it reads first and to keep the end
(`_KEPT_BYTES`); `kernels.triton.cast` goes from the last to the first. Predicted for bf16: of the
2 + 2 + 1 + 1 bytes an element of amax and casts, the second 2 come from L2 for 32 MiB of a tensor: 33 MB
less to read, 11 us at 3.0 TB/s; half of it if both halves of L2 come to hold a line.

Parts' amaxes need no zeroed memory, as an atomic maximum does, and no last program that knows it is the last,
which takes a counter that outlives the launch and that no other stream or CUDA graph in flight may share. Who
wants the amax takes the maximum of `PARTS` numbers: `kernels.triton.cast.scale_and_cast_tiles_kernel` in each
of its programs. That is 2 KiB out of L2 and one fp64 division a program, for a
launch less than with a kernel that makes the scale (1.6 us and a gap of 1.2 to 1.6 us on an H100; predicted:
2.5 us less).

Amaxes are compared as bits (`kernels.triton.magnitude`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.magnitude import magnitude

_ELEMENTS = 8192
"""Elements that a program reads at a time: four loads of 16 bytes a thread in bf16."""
PARTS = 512
"""Programs of `amax_kernel`, a power of 2: four of 8 warps on most of 132 multiprocessors, one wave."""
_KEPT_BYTES = 32 << 20
"""The end of a tensor that its amax asks L2 to keep."""
_KEEP, LET_GO = "evict_last", "evict_first"
"""What L2 is told of the end of a tensor, and of what is not read again soon."""


@triton.jit
def _largest_of(x_ptr, n, largest, number, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """`largest`, or the magnitudes of block `number` of n elements where these are larger."""
    at = number.to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + element, mask=at + element < n, other=0.0, eviction_policy=POLICY)
    return tl.maximum(largest, magnitude(x))


@triton.jit(do_not_specialize=["passing", "rounds"])
def amax_kernel(
    x_ptr, amaxes_ptr, n, passing, rounds, BLOCK: tl.constexpr, LET_GO: tl.constexpr, KEEP: tl.constexpr
):
    """The largest magnitude of each program's part of n elements, fp32; L2 lets go of `passing` rounds."""
    largest = tl.zeros([BLOCK], tl.int32)
    number = tl.program_id(0)
    stop = passing * tl.num_programs(0)
    while number < stop:
        largest = _largest_of(x_ptr, n, largest, number, BLOCK, LET_GO)
        number += tl.num_programs(0)
    stop = rounds * tl.num_programs(0)
    while number < stop:
        largest = _largest_of(x_ptr, n, largest, number, BLOCK, KEEP)
        number += tl.num_programs(0)
    tl.store(amaxes_ptr + tl.program_id(0), tl.max(largest, axis=0).to(tl.float32, bitcast=True))


def amax(x: Tensor) -> Tensor:
    """Max |x| as a scalar of x's dtype."""
    return torch.amax(amaxes_of_parts(x)).to(x.dtype)


def amaxes_of_parts(x: Tensor) -> Tensor:
    """(PARTS,) fp32, whose maximum is that of |x|."""
    x = _dense(x)
    amaxes = torch.empty(PARTS, dtype=torch.float32, device=x.device)
    rounds = triton.cdiv(x.numel(), _ELEMENTS * PARTS)
    kept = triton.cdiv(_KEPT_BYTES, _ELEMENTS * PARTS * x.element_size())
    with torch.cuda.device_of(x):
        amax_kernel[(PARTS,)](
            x,
            amaxes,
            x.numel(),
            max(rounds - kept, 0),
            rounds,
            BLOCK=_ELEMENTS,
            LET_GO=LET_GO,
            KEEP=_KEEP,
            num_warps=8,
        )
    return amaxes


def _dense(x: Tensor) -> Tensor:
    """The elements of x as they lie in memory, copied where there are gaps between them."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).contiguous()
