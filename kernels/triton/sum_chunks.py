"""The Triton form of `kernels.sum_chunks`: a few single warps that run beside another stream's GEMMs.

**What it costs the GEMMs.** Memory sets the time of this sum, and GEMMs leave most of memory's bandwidth
unused. But a GEMM's program fills the registers of its multiprocessor, so none of this runs beside it there:
while one runs the other waits. FSDP2's reduce stream has a high priority, so programs that wait are placed
before a GEMM's next ones. With a program a block they would take every multiprocessor that becomes free, up
to all 132 of a Hopper GPU; but memory is busy long before: it feeds about 20 that read 64 bytes a cycle each.
So there are at most `PROGRAMS`, which fill a quarter of the chip, and each walks over every `PROGRAMS`-th
block: somewhat longer, on a quarter of the multiprocessors. (A GEMM that deals out all its tiles when it
starts, and finds that quarter taken, ends as much later as this takes; with a program a block it would begin
later.)

**What keeps memory busy with so few** are the bytes on their way. An H200 reads half of its 4.27 TB/s here:
at a latency of 0.8 us, 1.7 MB. A thread has 2 N loads of 16 bytes on their way, or 2 `LOADS` where N is more:
2 KiB a warp where N is 2, and 2.1 MB in all `PROGRAMS`.

**A program is one warp.** A thread that loads 16 bytes has 8 numbers. Their fp32 sums are 32 bytes, and a
warp stores whole lines only where a thread stores 16 bytes next to its neighbour's 16: sums change hands.
Within a warp that takes shuffles; within more, shared memory and barriers, at which a program's loads run
dry. Single warps also find room where less than a whole multiprocessor becomes free.

**Caches.** All is read once, or written long before it is read: marked to be evicted first, it leaves the L2
cache to the GEMMs.

On an H200, N = 2, n = 109 M: the bytes need 0.20 ms. Measured beside the GEMMs, torch's reduction takes
0.54 ms (34 of them a step, 18.3 ms), on all multiprocessors; this one 0.50 to 0.64 (17.1 to 21.8 ms), on a
quarter. Predicted were 0.25 to 0.30: GEMMs leave it less of the memory than was thought.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sum_chunks import SPAN

BLOCK = SPAN
"""Elements of a block: 16 a thread, two loads of each chunk."""
LOADS = 4
"""Chunks that are on their way at once, at most: with more, 32 programs do not fit on a multiprocessor."""
PROGRAMS = 32 * 33
"""The most that a multiprocessor takes, on a quarter of Hopper's 132."""
PROGRAMS_ALONE = 32 * 132
NARROW_WARPS = 4
"""Of a program where accesses are of single elements: as many bytes on their way, on half of the chip."""
_ACCESS = 16  # bytes of a wide load or store; Triton also wants n to be a multiple of 16


@triton.jit
def sum_chunks_kernel(
    chunks, out, squares, n, N: tl.constexpr, LOADS: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the sums of n elements of N chunks; a program has every num_programs-th block."""
    block = tl.program_id(0).to(tl.int64)
    while block * BLOCK < n:
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < n
        chunk = chunks
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(N // LOADS):
            for _ in tl.static_range(LOADS):
                x = tl.load(chunk + place, mask=inside, eviction_policy="evict_first")
                total += x.to(tl.float32)
                chunk += n
        for _ in tl.static_range(N % LOADS):
            x = tl.load(chunk + place, mask=inside, eviction_policy="evict_first")
            total += x.to(tl.float32)
            chunk += n
        tl.store(out + place, total, mask=inside, eviction_policy="evict_first")
        if SQUARES:
            own = tl.where(inside, total, 0.0)
            tl.store(squares + block, tl.sum(own * own, axis=0))
        block += tl.num_programs(0)


def launch(chunks: Tensor, out: Tensor, squares: Tensor | None = None, programs: int = PROGRAMS) -> None:
    """Sum `chunks` (N, n) into `out` (n,), as `kernels.sum_chunks` has checked them, by so many programs."""
    N, n = chunks.shape
    if n == 0:
        return
    is_wide = not any(place % _ACCESS for place in (n, chunks.data_ptr(), out.data_ptr()))
    with torch.cuda.device_of(out):
        sum_chunks_kernel[(min(-(-n // BLOCK), programs),)](
            chunks,
            out,
            out if squares is None else squares,
            n,
            N=N,
            LOADS=LOADS,
            SQUARES=squares is not None,
            BLOCK=BLOCK,
            num_warps=1 if is_wide else NARROW_WARPS,
        )
