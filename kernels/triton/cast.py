"""Casts to float8 in Triton: the kernels behind `kernels.cast`, and what launches them.

x is (m, k) row-major. Memory sets the pace of all of them, so each element is read from it once a pass, and
every load and store moves 16 bytes a thread (rows of x8 and of x8ᵀ; sizes divisible by 16, as Triton sees
from the arguments; others are right but slower).

- `amax_kernel`: as many programs as fit on the chip stride over x; one atomic each.
- `cast_kernel`: elementwise.
- `cast_tiles_kernel`: a tile in, its float8 form out twice, the second time transposed through shared memory.
- `cast_rows_kernel`: a program owns whole rows, few enough that all running programs' rows stay in L2, where
  its second loop finds them. On the way it folds |x| into the columns' amaxes.
- `column_amax_kernel`, `transpose_kernel`: what their names say.

An amax is kept as bits (`kernels.triton.magnitude`).

`dtype` gives the format, whose largest value clamps; `stored_as`, where given, is the dtype that is written
in its place, so that the arithmetic can be looked at before it is rounded to float8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scaling import float8_max
from kernels.triton.magnitude import magnitude

_TILE = 128
"""Rows and columns of a tile: 128 bytes, a line of L2, in either direction of float8."""
_TILE_WARPS = 8
_ELEMENTS = 4096
"""Elements a program casts in `cast_kernel`: 16 a thread of 8 warps, one store each."""
_AMAX_ELEMENTS = 8192
_AMAX_PROGRAMS = 528
"""Four programs of 8 warps on each of 132 multiprocessors: one wave."""
_ROW_ELEMENTS, _ROW_CHUNK, _ROW_WARPS = 65536, 8192, 16
"""Of `cast_rows_kernel`: elements that a program owns (34 MB of bf16 at 2 programs a multiprocessor) and that
it holds at a time."""


@triton.jit
def _saturated(x, scale, fmax: tl.constexpr):
    y = tl.maximum(x.to(tl.float32) * scale, -fmax, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, fmax, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scale_of(bits, fmax: tl.constexpr, power_of_2: tl.constexpr):
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
def amax_kernel(x_ptr, amax_ptr, n, rounds, BLOCK: tl.constexpr):
    """The largest magnitude of n elements, as bits; amax_ptr holds 0 before."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    largest = tl.zeros([BLOCK], tl.int32)
    number = 0
    while number < rounds:
        index = first + number * stride + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, magnitude(tl.load(x_ptr + index, mask=index < n, other=0.0)))
        number += 1
    tl.atomic_max(amax_ptr, tl.max(largest, axis=0), sem="relaxed")


@triton.jit
def cast_kernel(x_ptr, scale_ptr, out_ptr, n, fmax: tl.constexpr, BLOCK: tl.constexpr):
    """Elementwise cast with one scale."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0)
    y = _saturated(x, tl.load(scale_ptr), fmax)
    tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=index < n)


@triton.jit
def cast_tiles_kernel(
    x_ptr,
    scale_ptr,
    column_amax_ptr,
    rows_ptr,
    columns_ptr,
    m,
    k,
    fmax: tl.constexpr,
    power_of_2: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    TILE: tl.constexpr,
):
    """X8ᵀ (k, m) and, with WRITE_ROWS, x8 (m, k).

    One scale is read from scale_ptr; or BY_COLUMN they are made of column_amax_ptr and written there.
    """
    tile = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(k, TILE)
    row = (tile // across) * TILE + tl.arange(0, TILE)
    column = (tile % across) * TILE + tl.arange(0, TILE)
    here = (row < m)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=here, other=0.0)
    if BY_COLUMN:
        bits = tl.load(column_amax_ptr + column, mask=column < k, other=0)
        scale = _scale_of(bits, fmax, power_of_2)
        if tile < across:
            tl.store(scale_ptr + column, scale, mask=column < k)
        y = _saturated(x, scale[None, :], fmax).to(columns_ptr.dtype.element_ty)
    else:
        y = _saturated(x, tl.load(scale_ptr), fmax).to(columns_ptr.dtype.element_ty)
    if WRITE_ROWS:
        tl.store(rows_ptr + row[:, None] * k + column[None, :], y, mask=here)
    turned = (column < k)[:, None] & (row < m)[None, :]
    tl.store(columns_ptr + column[:, None] * m + row[None, :], tl.trans(y), mask=turned)


@triton.jit
def cast_rows_kernel(
    x_ptr,
    rows_ptr,
    scale_ptr,
    column_amax_ptr,
    m,
    k,
    fmax: tl.constexpr,
    power_of_2: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """X8 (m, k) and its scales (m); with COLUMNS the bits of the columns' amaxes, which are 0 before."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros([ROWS, CHUNK], tl.int32)
    for number in range(CHUNKS):
        column = number * CHUNK + tl.arange(0, CHUNK)
        here = (row < m)[:, None] & (column < k)[None, :]
        x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=here, other=0.0)
        bits = magnitude(x)
        largest = tl.maximum(largest, bits)
        if COLUMNS:
            folded = tl.max(bits, axis=0)
            tl.atomic_max(column_amax_ptr + column, folded, mask=column < k, sem="relaxed")
    scale = _scale_of(tl.max(largest, axis=1), fmax, power_of_2)
    tl.store(scale_ptr + row, scale, mask=row < m)
    for number in range(CHUNKS):
        column = number * CHUNK + tl.arange(0, CHUNK)
        here = (row < m)[:, None] & (column < k)[None, :]
        place = row[:, None] * k + column[None, :]
        y = _saturated(tl.load(x_ptr + place, mask=here, other=0.0), scale[:, None], fmax)
        tl.store(rows_ptr + place, y.to(rows_ptr.dtype.element_ty), mask=here)


@triton.jit
def column_amax_kernel(x_ptr, column_amax_ptr, m, k, TILE: tl.constexpr):
    """Folds a tile's magnitudes into the bits of the columns' amaxes, which are 0 before."""
    tile = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(k, TILE)
    row = (tile // across) * TILE + tl.arange(0, TILE)
    column = (tile % across) * TILE + tl.arange(0, TILE)
    here = (row < m)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=here, other=0.0)
    tl.atomic_max(column_amax_ptr + column, tl.max(magnitude(x), axis=0), mask=column < k, sem="relaxed")


@triton.jit
def transpose_kernel(x_ptr, out_ptr, m, k, TILE: tl.constexpr):
    """Xᵀ (k, m) of x (m, k), one byte an element."""
    tile = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(k, TILE)
    row = (tile // across) * TILE + tl.arange(0, TILE)
    column = (tile % across) * TILE + tl.arange(0, TILE)
    here = (row < m)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=here, other=0)
    turned = (column < k)[:, None] & (row < m)[None, :]
    tl.store(out_ptr + column[:, None] * m + row[None, :], tl.trans(x), mask=turned)


def amax(x: Tensor) -> Tensor:
    """Max |x| as a scalar of x's dtype."""
    x = x.contiguous()
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    blocks = triton.cdiv(x.numel(), _AMAX_ELEMENTS)
    programs = min(blocks, _AMAX_PROGRAMS)
    rounds = triton.cdiv(blocks, programs)
    with torch.cuda.device_of(x):
        amax_kernel[(programs,)](x, bits, x.numel(), rounds, BLOCK=_AMAX_ELEMENTS, num_warps=8)
    return bits.view(torch.float32).to(x.dtype)


def cast_float8(x: Tensor, scale: Tensor, dtype: torch.dtype, stored_as: torch.dtype | None = None) -> Tensor:
    """X8 of x's shape."""
    return cast_float8_into(torch.empty(x.shape, dtype=stored_as or dtype, device=x.device), x, scale, dtype)


def cast_float8_into(out: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X8, written to `out`, which is contiguous."""
    x = x.contiguous()
    grid = (triton.cdiv(x.numel(), _ELEMENTS),)
    with torch.cuda.device_of(x):
        cast_kernel[grid](x, scale, out, x.numel(), float8_max(dtype), BLOCK=_ELEMENTS, num_warps=8)
    return out


def cast_both(
    x: Tensor, scale: Tensor, dtype: torch.dtype, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x8 (M, K) and x8ᵀ (K, M)."""
    rows = torch.empty(x.shape, dtype=stored_as or dtype, device=x.device)
    return rows, _cast_tiles(x, dtype, stored_as, scale, rows=rows)


def cast_transposed(
    x: Tensor, scale: Tensor, dtype: torch.dtype, stored_as: torch.dtype | None = None
) -> Tensor:
    """x8ᵀ (K, M)."""
    return _cast_tiles(x, dtype, stored_as, scale)


def cast_rows(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x8 (M, K) and its scales (M, 1)."""
    return _cast_rows(x, dtype, power_of_2, stored_as, None)


def cast_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x8ᵀ (K, M) and its scales (1, K)."""
    x = x.contiguous()
    column_amax = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        column_amax_kernel[_tiles(x)](x, column_amax, *x.shape, TILE=_TILE, num_warps=_TILE_WARPS)
    return _cast_columns(x, dtype, power_of_2, stored_as, column_amax)


def cast_rows_and_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `cast_rows` and then what `cast_columns` give."""
    x = x.contiguous()
    column_amax = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    by_rows = _cast_rows(x, dtype, power_of_2, stored_as, column_amax)
    return (*by_rows, *_cast_columns(x, dtype, power_of_2, stored_as, column_amax))


def transpose_float8(x: Tensor) -> Tensor:
    """xᵀ (C, R) of x (R, C)."""
    x = x.contiguous()
    out = torch.empty((x.shape[1], x.shape[0]), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        transpose_kernel[_tiles(x)](
            x.view(torch.uint8), out.view(torch.uint8), *x.shape, TILE=_TILE, num_warps=_TILE_WARPS
        )
    return out


def _tiles(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0], _TILE) * triton.cdiv(x.shape[1], _TILE),)


def _cast_tiles(
    x: Tensor,
    dtype: torch.dtype,
    stored_as: torch.dtype | None,
    scale: Tensor,
    *,
    rows: Tensor | None = None,
    column_amax: Tensor | None = None,
    power_of_2: bool = False,
) -> Tensor:
    x = x.contiguous()
    columns = torch.empty((x.shape[1], x.shape[0]), dtype=stored_as or dtype, device=x.device)
    with torch.cuda.device_of(x):
        cast_tiles_kernel[_tiles(x)](
            x,
            scale,
            # Where a tensor is not there another stands in for it, and the kernel leaves it alone.
            scale if column_amax is None else column_amax,
            columns if rows is None else rows,
            columns,
            *x.shape,
            float8_max(dtype),
            power_of_2,
            WRITE_ROWS=rows is not None,
            BY_COLUMN=column_amax is not None,
            TILE=_TILE,
            num_warps=_TILE_WARPS,
        )
    return columns


def _cast_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None, column_amax: Tensor
) -> tuple[Tensor, Tensor]:
    scale = torch.empty((1, x.shape[1]), dtype=torch.float32, device=x.device)
    columns = _cast_tiles(x, dtype, stored_as, scale, column_amax=column_amax, power_of_2=power_of_2)
    return columns, scale


def _cast_rows(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None, column_amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    m, k = x.shape
    out = torch.empty((m, k), dtype=stored_as or dtype, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    rows = rows_of_a_program(k)
    chunk = _ROW_CHUNK // rows
    with torch.cuda.device_of(x):
        cast_rows_kernel[(triton.cdiv(m, rows),)](
            x,
            out,
            scale,
            scale if column_amax is None else column_amax,
            m,
            k,
            float8_max(dtype),
            power_of_2,
            COLUMNS=column_amax is not None,
            ROWS=rows,
            CHUNK=chunk,
            CHUNKS=triton.cdiv(k, chunk),
            num_warps=_ROW_WARPS,
        )
    return out, scale


def rows_of_a_program(k: int) -> int:
    """Rows of k elements that a program of `cast_rows_kernel` owns: a power of two."""
    rows = 1
    while rows < 32 and 2 * rows * k <= _ROW_ELEMENTS:
        rows *= 2
    return rows
