"""The Triton form of `kernels.norm`: two launches for any number of tensors.

The first gives each block of each tensor (`kernels.triton.tensor_table`) its sum of squares, the second adds
the sums of a tensor's blocks and takes the root. Every addition has its place: no atomics, the same bits each
time.

A thread of a full block has ACCESSES loads of 16 bytes, of which about half begin before the first is needed.
It has so few registers that six to eight programs share a multiprocessor: about 100 KiB of it are on their
way at a time, enough to keep the memory busy also while some programs look up their tensor. Blocks are laid
from the 16-byte boundary at or before the tensor's first element, so that one that begins elsewhere costs no
more; what is not its own is left out in the first block and the last, which go element by element, one access
of a thread after the other, to keep registers few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.tensor_table import ACCESS, WARPS, bisections, block_size, build_table, find_tensor

ACCESSES = 8
"""Loads of a thread of a full block."""
ADDED = 4096
"""Sums of blocks that the second kernel adds at a time."""


@triton.jit(do_not_specialize=["tensors"])
def squares_kernel(
    table,  # (3, P) int64: first block, end, address; elements count from the boundary before the tensor
    sums,  # (blocks,) fp32
    tensors,  # P
    BISECTIONS: tl.constexpr,
    BF16: tl.constexpr,
    SPAN: tl.constexpr,  # elements of one access of all threads
    BLOCK: tl.constexpr,
):
    """The sum of squares of block `program_id` of all tensors' blocks in a row."""
    block = tl.program_id(0)
    row = table + find_tensor(table, tensors, block, BISECTIONS)
    start = (block - tl.load(row)) * BLOCK
    end = tl.load(row + tensors)
    address = tl.load(row + 2 * tensors)
    before = address & 15  # bytes between the boundary and the tensor
    data = (address - before).to(tl.pointer_type(tl.bfloat16 if BF16 else tl.float32))
    skipped = before // (2 if BF16 else 4)
    if (start >= skipped) & (start + BLOCK <= end):
        wide = tl.multiple_of(data + start, 16)
        x = tl.load(wide + tl.arange(0, BLOCK), eviction_policy="evict_first").to(tl.float32)
        total = tl.sum(x * x, axis=0)
    else:
        squares = tl.zeros((SPAN,), tl.float32)
        limit = tl.minimum(start + BLOCK, end)
        while start < limit:  # not a range: Triton 3.6's interpreter has none between numbers that are loaded
            offsets = start + tl.arange(0, SPAN)
            x = tl.load(data + offsets, mask=(offsets >= skipped) & (offsets < end), other=0.0)
            squares += x.to(tl.float32) * x.to(tl.float32)
            start += SPAN
        total = tl.sum(squares, axis=0)
    tl.store(sums + block, total)


@triton.jit(do_not_specialize=["tensors", "blocks"])
def roots_kernel(
    table,  # as above
    sums,  # (blocks,) fp32
    norms,  # (P,) fp32
    tensors,  # P
    blocks,
    BLOCK: tl.constexpr,
):
    """The norm of tensor `program_id`."""
    tensor = tl.program_id(0)
    first = tl.load(table + tensor)
    following = tl.load(table + tl.minimum(tensor + 1, tensors - 1))
    end = tl.where(tensor + 1 < tensors, following, blocks)
    added = tl.zeros((BLOCK,), tl.float32)
    while first < end:
        offsets = first + tl.arange(0, BLOCK)
        added += tl.load(sums + offsets, mask=offsets < end, other=0.0)
        first += BLOCK
    tl.store(norms + tensor, tl.sqrt_rn(tl.sum(added, axis=0)))


def launch(tensors: list[Tensor]) -> Tensor:
    """Norms of all tensors, (P,) fp32; the argument as `kernels.norm.tensor_norms` has checked it.

    One that is not contiguous is copied first.
    """
    tensors = [t.contiguous() for t in tensors]
    device, element = tensors[0].device, tensors[0].element_size()
    span = block_size([element])
    addresses = [t.data_ptr() for t in tensors]
    ends = [
        t.numel() + address % ACCESS // element if t.numel() else 0
        for t, address in zip(tensors, addresses, strict=True)
    ]
    table, blocks = build_table(ends, [addresses], ACCESSES * span, device)
    norms = torch.empty(len(tensors), dtype=torch.float32, device=device)
    if blocks == 0:
        return norms.zero_()
    sums = torch.empty(blocks, dtype=torch.float32, device=device)
    squares_kernel[(blocks,)](
        table,
        sums,
        len(tensors),
        BISECTIONS=bisections(len(tensors)),
        BF16=tensors[0].dtype == torch.bfloat16,
        SPAN=span,
        BLOCK=ACCESSES * span,
        num_warps=WARPS,
    )
    roots_kernel[(len(tensors),)](table, sums, norms, len(tensors), blocks, BLOCK=ADDED, num_warps=WARPS)
    return norms
