"""RMSNorm and its backward, each in one pass; forward can add to the residual stream on the way.

Forward, one program a row: the row stays in registers between the sum of squares and the product. Backward,
one program for `rows` neighbouring rows: each adds its part of the weight's gradient in registers, and the
parts, (programs, D) fp32, are added afterwards: fixed order, no atomics. There are as few parts as can be, 8
warps a multiprocessor. So few have too little of memory on its way while they sum a row up, which is why the
next rows are fetched into shared memory meanwhile (`tl.range`'s stages).

Bytes an element in bf16 (the weight and its gradient's parts aside): forward 2 read, 2 written; with the
addition 4 and 4, where two operations take 6 and 4. Backward 4 read, 2 written; with the gradient of the
residual stream 6 and 2, where two operations take 8 and 4. An amax of y or of dh saves the 2 that are read
to find it.

Measured on an H100, (8192, 4096) bf16, backward of one, two and three gradients with stream and amax: 104,
126 and 150 us, 2.7 TB/s, where two or three programs a multiprocessor, which fetched nothing ahead, took 119,
140 and 175. Of these torch's sum over the parts was 13 where they were 384; `add_parts_kernel` came after.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rms_norm import MOST_GRADS
from kernels.triton.magnitude import raise_amax

_WARPS = 8
"""Of backward's programs on a multiprocessor, together."""
_MOST_STAGES = 4
"""Rows that are on their way or in hand, at most."""
_REDUCTIONS = 16 * 1024
"""Bytes of shared memory that are not for rows."""
_COLUMNS, _PARTS = 32, 64
"""Of `add_parts_kernel`: columns of a program, and parts that it reads at a time."""


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    total,
    out,
    rstd,
    amax,
    eps,
    D,
    WITH_RESIDUAL: tl.constexpr,
    WITH_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm of x (+ residual) times weight for a row; rstd beside it; total is the sum, where there is one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    place = row * D + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if WITH_RESIDUAL:
        summed = (value + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty
        )
        tl.store(total + place, summed, mask=inside)
        value = summed.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    tl.store(rstd + row, inverse)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    y = (value * inverse * w).to(out.dtype.element_ty)
    tl.store(out + place, y, mask=inside)
    if WITH_AMAX:
        raise_amax(amax, y)


@triton.jit
def backward_kernel(
    grad,
    second_grad,
    third_grad,
    x,
    weight,
    rstd,
    stream_grad,
    grad_x,
    grad_weight_parts,
    amax,
    M,
    D,
    GRADS: tl.constexpr,
    WITH_STREAM: tl.constexpr,
    WITH_AMAX: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x (+ stream_grad) of ROWS rows, and their part of the weight's gradient; amax is grad_x's.

    y's gradient is the sum of one, two or three.
    """
    column = tl.arange(0, BLOCK)
    in_row = column < D
    part = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for number in tl.range(0, ROWS, num_stages=STAGES):
        row = first + number
        inside = in_row & (row < M)
        place = row * D + column
        inverse = tl.load(rstd + row, mask=row < M, other=0.0)
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * inverse
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if GRADS > 1:
            dy += tl.load(second_grad + place, mask=inside, other=0.0).to(tl.float32)
        if GRADS > 2:
            dy += tl.load(third_grad + place, mask=inside, other=0.0).to(tl.float32)
        part += dy * normed
        # Read again for every row, from the cache: kept, it would take registers that a long row needs.
        weighted = dy * tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
        along = tl.sum(weighted * normed, axis=0) / D
        dx = (weighted - normed * along) * inverse
        if WITH_STREAM:
            dx += tl.load(stream_grad + place, mask=inside, other=0.0).to(tl.float32)
        rounded = dx.to(grad_x.dtype.element_ty)
        tl.store(grad_x + place, rounded, mask=inside)
        if WITH_AMAX:  # an infinite `along` makes NaN of the zeros that stand outside
            raise_amax(amax, tl.where(inside, rounded, 0.0))
    tl.store(grad_weight_parts + tl.program_id(0).to(tl.int64) * D + column, part, mask=in_row)


@triton.jit
def add_parts_kernel(parts, out, P, D, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The sum of (P, D) over P, PARTS at a time."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    first = 0
    while first < P:
        number = first + tl.arange(0, PARTS)
        inside = (number < P)[:, None] & (column < D)[None, :]
        total += tl.load(parts + number[:, None] * D + column[None, :], mask=inside, other=0.0)
        first += PARTS
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < D)


def block_and_warps(D: int) -> tuple[int, int]:
    """Elements of a program's row, a power of two, and its warps: 16 elements a thread."""
    block = triton.next_power_of_2(D)
    return block, min(32, max(1, block // 512))


@functools.cache
def chip_of(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that each has for rows; where it is no GPU, Hopper's."""
    if device.type != "cuda":
        return 132, 227 * 1024 - _REDUCTIONS
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin - _REDUCTIONS


def programs_and_stages(D: int, row_bytes: int, device: torch.device) -> tuple[int, int]:
    """Backward's programs at most, and stages.

    Args:
        D: Elements of a row.
        row_bytes: What a program reads for a row, of all tensors.
        device: Where it runs.
    """
    multiprocessors, shared = chip_of(device)
    warps = block_and_warps(D)[1]
    together = max(1, _WARPS // warps)
    if warps == 32:  # 64 registers a thread: too few for a row that is fetched beside one in hand
        return multiprocessors, 1
    return multiprocessors * together, min(_MOST_STAGES, 1 + shared // (together * row_bytes))


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, amax: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(x + residual or None, y, rstd) of contiguous (M, D) rows; `amax` is (1,) fp32 zeros, or None."""
    M, D = x.shape
    out, rstd = torch.empty_like(x), torch.empty(M, dtype=torch.float32, device=x.device)
    total = None if residual is None else torch.empty_like(x)
    block, warps = block_and_warps(D)
    if M:
        forward_kernel[(M,)](
            x,
            x if residual is None else residual,
            weight,
            x if total is None else total,
            out,
            rstd,
            rstd if amax is None else amax.view(torch.int32),
            eps,
            D,
            WITH_RESIDUAL=residual is not None,
            WITH_AMAX=amax is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return total, out, rstd


def launch_backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    stream_grad: Tensor | None,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of x, of the weight) for contiguous (M, D) rows; the former plus `stream_grad`, if given.

    `grads`, one to three, are added; `amax` is (1,) fp32 zeros, or None.
    """
    M, D = x.shape
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    block, warps = block_and_warps(D)
    read = len(grads) + 2 + (stream_grad is not None)  # x and the weight too
    most, stages = programs_and_stages(D, read * block * x.element_size(), x.device)
    rows = triton.cdiv(M, most)
    programs = triton.cdiv(M, rows) if M else 0
    parts = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if M:
        backward_kernel[(programs,)](
            *grads,
            *[grads[0]] * (MOST_GRADS - len(grads)),
            x,
            weight,
            rstd,
            grads[0] if stream_grad is None else stream_grad,
            grad_x,
            parts,
            parts if amax is None else amax.view(torch.int32),
            M,
            D,
            GRADS=len(grads),
            WITH_STREAM=stream_grad is not None,
            WITH_AMAX=amax is not None,
            ROWS=rows,
            STAGES=stages,
            BLOCK=block,
            num_warps=warps,
        )
    add_parts_kernel[(triton.cdiv(D, _COLUMNS),)](
        parts, grad_weight, programs, D, COLUMNS=_COLUMNS, PARTS=_PARTS
    )
    return grad_x, grad_weight
