"""Cross-entropy of bf16 logits without a copy in fp32: two kernels read the logits and write over them.

`rows_kernel`, one program a row: every lane keeps its own running maximum m and sum of exp(z - m) over groups
of 8 logits (one 16-byte load), so that an exponential is taken once an element and lanes meet only at the
end.
`gradient_kernel`, one program a block of a row: softmax minus one-hot, times the row's factor, over the
logits.

Bytes a logit in bf16: 2 read, then 2 read and 2 written. Measured on an H100, 8192 x 128,256: 0.69 and 1.48
ms, 3.0 and 2.8 TB/s. Offsets are 64-bit: tokens x vocabulary may exceed 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8
"""Logits that one lane reads at once: 16 bytes of bf16."""
LANES = 512
"""Groups that a program reads at once; times GROUP, the logits of a block."""
WARPS = 8
_LOWEST = tl.constexpr(-3.0e38)  # stands for no logit yet: unlike -inf, less itself it is 0


@triton.jit
def rows_kernel(
    logits,
    index,
    log_sum,
    at_label,
    row_stride,
    V,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Log sum exp of a row of (T, V) logits, and its logit at `index` (0 where that is not in the row)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    offset = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full((LANES,), _LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for number in range(BLOCKS):
        column = number * LANES * GROUP + offset
        z = tl.load(start + column, mask=column < V, other=float("-inf")).to(tl.float32)
        # tl.max passes over NaN; the exponential below does not, so a NaN reaches the sum.
        new_top = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), axis=1)
        top = new_top
    row_top = tl.max(top, axis=0)
    row_total = tl.sum(total * tl.exp(top - row_top), axis=0)
    tl.store(log_sum + row, row_top + tl.log(row_total))
    label = tl.load(index + row)
    in_row = (label >= 0) & (label < V)
    tl.store(at_label + row, tl.load(start + label, mask=in_row, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(
    logits,
    index,
    log_sum,
    factor,
    row_stride,
    V,
    BLOCK: tl.constexpr,
):
    """Row t of the logits becomes (softmax - onehot(index[t])) * factor[t], 0 where the factor is 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * row_stride + column
    inside = column < V
    scale = tl.load(factor + row)
    if scale == 0.0:
        tl.store(place, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=inside)
    else:
        z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        probability = tl.exp(z - tl.load(log_sum + row))
        gradient = tl.where(column == tl.load(index + row), probability - 1.0, probability) * scale
        tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def launch_rows(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(log sum exp, logit at the label), each (T,) fp32, of (T, V) logits whose rows are contiguous."""
    T, V = logits.shape
    log_sum = torch.empty(T, dtype=torch.float32, device=logits.device)
    at_label = torch.empty_like(log_sum)
    if T:
        rows_kernel[(T,)](
            logits,
            index,
            log_sum,
            at_label,
            logits.stride(0),
            V,
            BLOCKS=triton.cdiv(V, LANES * GROUP),
            LANES=LANES,
            GROUP=GROUP,
            num_warps=WARPS,
        )
    return log_sum, at_label


def launch_gradient(logits: Tensor, index: Tensor, log_sum: Tensor, factor: Tensor) -> None:
    """Write the gradient over (T, V) logits whose rows are contiguous."""
    T, V = logits.shape
    block = LANES * GROUP
    if T:
        gradient_kernel[(T, triton.cdiv(V, block))](
            logits, index, log_sum, factor, logits.stride(0), V, BLOCK=block, num_warps=WARPS
        )
