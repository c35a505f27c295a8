"""A table of tensors, by which one launch serves any number of them: `adamw` and `norm` use it.

A launch for each tensor would cost the host tens of microseconds a tensor, which for the shards of many GPUs
is longer than the work itself, and small tensors would leave the chip idle. So each tensor is cut into
blocks, the blocks of all tensors are counted in one row, and a program is told its block's number. The table,
int64 with a column for each tensor, says whose it is:

    row 0   number of the tensor's first block
    row 1   where the tensor ends, in elements: its size, for those that begin at 0
    others  what a kernel needs besides: addresses

A program finds its tensor by bisection of row 0. An empty tensor has no block: its number is that of the next
one, and the last tensor with a number is the one with elements. The table travels once a launch, from pinned
memory, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
ACCESS = 16
"""Bytes of a thread's widest load or store."""


@triton.jit
def find_tensor(table, tensors, block, BISECTIONS: tl.constexpr):
    """The last of `tensors` whose first block is not behind `block`."""
    low = tensors * 0
    high = tensors + 0
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        is_behind = tl.load(table + middle) > block
        low = tl.where(is_behind, low, middle)
        high = tl.where(is_behind, middle, high)
    return low


def bisections(tensors: int) -> int:
    """So many that `tensors` become one; rounded up, for few variants of a kernel."""
    return 4 * -(-tensors.bit_length() // 4)


def block_size(element_sizes: Iterable[int]) -> int:
    """Elements that a program moves in one full access; from the bytes of an element of each of its parts."""
    return 32 * WARPS * ACCESS // max(element_sizes)


def build_table(
    ends: Sequence[int], rows: Iterable[Sequence[int]], block: int, device: torch.device
) -> tuple[Tensor, int]:
    """The table on `device`, (2 + rows, P) int64, and the number of all blocks.

    Args:
        ends: Where each of P tensors ends, in elements.
        rows: P values each.
        block: Elements of a block.
        device: Where the kernel runs.
    """
    first, blocks = [], 0
    for end in ends:
        first.append(blocks)
        blocks += -(-end // block)  # triton.cdiv is slow on the host
    table = torch.tensor([first, ends, *rows], dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table, blocks
