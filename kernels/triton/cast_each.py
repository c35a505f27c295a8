"""The Triton form of `kernels.cast.cast_each_into`: one launch for any number of tensors.

Tensors are found by a table (`kernels.triton.tensor_table`). It holds addresses and sizes alone, so one that
was sent once serves every launch over the same memory: the shards of a model stay where they are, and what
they are cast into is used in turn. Scales are new in each step, but lie as far from each other as before.

With scales elements become float8, 5 bytes an fp32 element; without they are rounded to another dtype as they
are, 6 bytes from fp32 to bf16.

Measured on an H200: half of Llama 3 8B's blocks, 3.5 G fp32 elements, to float8 in 32 launches 4.35 ms,
where 224 launches took 5.5 and the copy of the results to what travels 6.6 more. Half of one block to bf16 is
152 us, 4.3 TB/s; `torch._foreach_copy_` takes 199 in 13 launches, and 22 ms a step beside GEMMs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scaling import float8_max
from kernels.triton.cast import saturated
from kernels.triton.tensor_table import ACCESS, WARPS, bisections, build_table, find_tensor

_ELEMENTS = 4096
"""Elements of a block, 16 a thread: 4.3 TB/s on an H200, as with 8192; of 16,384 float8 ones it is 3.8."""


@triton.jit
def _converted(x, scale, out_ptr, fmax: tl.constexpr):
    """X in the dtype of `out_ptr`: scaled and clamped, or with no fmax as it is."""
    if fmax is not None:
        x = saturated(x, scale, fmax)
    return x.to(out_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["tensors"])
def cast_each_kernel(
    table,  # (6, P) int64: first block, end, is aligned, address of x, place of scale, address of out
    first_ptr,  # a tensor and its place, for their dtypes
    first_out_ptr,
    scale_ptr,  # the first tensor's; with no fmax it is not read
    tensors,  # P
    fmax: tl.constexpr,
    BISECTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cast block `program_id` of all tensors' blocks in a row."""
    block = tl.program_id(0)
    row = table + find_tensor(table, tensors, block, BISECTIONS)
    start = (block - tl.load(row)) * BLOCK
    left = tl.load(row + tensors) - start
    is_aligned = tl.load(row + 2 * tensors)
    x = tl.load(row + 3 * tensors).to(first_ptr.dtype) + start
    out = tl.load(row + 5 * tensors).to(first_out_ptr.dtype) + start
    scale = 1.0
    if fmax is not None:
        scale = tl.load(scale_ptr + tl.load(row + 4 * tensors))
    offsets = tl.arange(0, BLOCK)
    if (is_aligned != 0) & (left >= BLOCK):
        y = tl.load(tl.multiple_of(x, 16) + offsets)
        tl.store(tl.multiple_of(out, 16) + offsets, _converted(y, scale, first_out_ptr, fmax))
    else:
        y = tl.load(x + offsets, mask=offsets < left, other=0.0)
        tl.store(out + offsets, _converted(y, scale, first_out_ptr, fmax), mask=offsets < left)


def launch(
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    dtype: torch.dtype,
    stored_as: torch.dtype | None = None,
) -> None:
    """Cast all tensors; arguments as `kernels.cast.cast_each_into` has checked them."""
    device = tensors[0].device
    # Memory of a table belongs to the stream that it was sent on.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    table, blocks = _table(
        tuple(t.numel() for t in tensors),
        tuple(t.data_ptr() for t in tensors),
        _places(scales) if scales else (0,) * len(tensors),
        tuple(out.data_ptr() for out in outs),
        device,
        stream,
    )
    if blocks == 0:
        return
    with torch.cuda.device_of(tensors[0]):
        cast_each_kernel[(blocks,)](
            table,
            tensors[0],
            outs[0].view(stored_as or dtype),
            scales[0] if scales else table,
            len(tensors),
            float8_max(dtype) if scales else None,
            BISECTIONS=bisections(len(tensors)),
            BLOCK=_ELEMENTS,
            num_warps=WARPS,
        )


def _places(scales: Sequence[Tensor]) -> tuple[int, ...]:
    """How many elements each scale is behind the first."""
    first = scales[0].data_ptr()
    return tuple((scale.data_ptr() - first) // scale.element_size() for scale in scales)


@functools.lru_cache(maxsize=1024)
def _table(
    sizes: tuple[int, ...],
    tensors: tuple[int, ...],
    scale_places: tuple[int, ...],
    outs: tuple[int, ...],
    device: torch.device,
    stream: int,
) -> tuple[Tensor, int]:
    """The kernel's table for tensors of these sizes at these addresses, and the number of all blocks.

    Scales are so many elements behind the first.
    """
    aligned = [int(not (x % ACCESS or out % ACCESS)) for x, out in zip(tensors, outs, strict=True)]
    return build_table(sizes, [aligned, tensors, scale_places, outs], _ELEMENTS, device)
