"""Casts to float8 with a scale per row and per column, in Triton: further kernels behind `kernels.cast`.

As in `kernels.triton.cast`, whose tiles write what is turned:

- `amaxes_kernel`: of rows and columns in one pass, by tiles: an atomic a row and tile, and a column and
  program, or 512 in 65,536 elements. (A program that owns whole rows needs one per column for its few rows.)
- `scales_kernel`: their scales and inverses; fp64 division is too slow to be repeated in every tile.
- `cast_rows_kernel`: a program owns whole rows and holds them in registers between amax and cast.
- `cast_by_column_kernel`: elementwise, for what is not turned before it is cast.

So scales by row and column cost 2 + 2 + 1 + 1 bytes an element in bf16. At 3.0 TB/s that is 67 us for
(8192, 4096), 235 us for (8192, 14336), 117 us for (14336, 4096) and 17 us for (8192, 1024); and some 5 us for
three small launches, less what the second pass finds in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scaling import float8_max
from kernels.triton.cast import (
    cast_tiles,
    last_first,
    saturated,
    tile_of,
    tiles_of,
    transpose_float8,
    turns_before_casting,
)
from kernels.triton.magnitude import magnitude
from kernels.triton.scale import inverse_of, scale_of

_AMAXES_HEIGHT, _AMAXES_WIDTH = 64, 256
"""Of `amaxes_kernel`: a tile's rows and columns, 8 loads of 16 bytes a thread in bf16; a row is a warp's."""
_AMAXES_DEPTH, _AMAXES_PROGRAMS = 4, 1024
"""Tiles that a program goes down, less where that leaves fewer programs than two waves."""
_SCALES = 512
"""Scales that a program makes."""
_ROW_ELEMENTS, _ROW_CHUNK, _THREAD_ELEMENTS = 8192, 32768, 32
"""Of `cast_rows_kernel`: elements that a program holds at least and at most, and a thread (the longest rows:
twice as many)."""


@triton.jit
def amaxes_kernel(
    x_ptr,
    amax_ptr,
    m,
    k,
    depth,
    BY_ROW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Bits of the columns' amaxes (k) and, BY_ROW, after them of the rows' (m); all are 0 before.

    A program goes down through `depth` tiles: an atomic a column, and one a row and tile.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(k, WIDTH)
    column = (program % across) * WIDTH + tl.arange(0, WIDTH)
    first = (program // across) * depth * HEIGHT
    largest = tl.zeros([WIDTH], tl.int32)
    number = 0
    while number < depth:
        row = first + number * HEIGHT + tl.arange(0, HEIGHT)
        here = (row < m)[:, None] & (column < k)[None, :]
        x = tl.load(x_ptr + row[:, None] * k + column[None, :], mask=here, other=0.0)
        bits = magnitude(x)
        largest = tl.maximum(largest, tl.max(bits, axis=0))
        if BY_ROW:
            tl.atomic_max(amax_ptr + k + row, tl.max(bits, axis=1), mask=row < m, sem="relaxed")
        number += 1
    tl.atomic_max(amax_ptr + column, largest, mask=column < k, sem="relaxed")


@triton.jit
def scales_kernel(
    amax_ptr,
    column_scale_ptr,
    column_inverse_ptr,
    row_scale_ptr,
    row_inverse_ptr,
    k,
    n,
    fmax: tl.constexpr,
    power_of_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scales and inverses of n amaxes (bits), of which the first k are the columns', the others the rows'."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = scale_of(tl.load(amax_ptr + index, mask=index < n, other=0), fmax, power_of_2)
    inverse = inverse_of(scale)
    is_row = (index >= k) & (index < n)
    tl.store(column_scale_ptr + index, scale, mask=index < k)
    tl.store(column_inverse_ptr + index, inverse, mask=index < k)
    tl.store(row_scale_ptr + (index - k), scale, mask=is_row)
    tl.store(row_inverse_ptr + (index - k), inverse, mask=is_row)


@triton.jit
def cast_by_column_kernel(
    x_ptr, scale_ptr, out_ptr, m, k, fmax: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """X8 (m, k), row-major, with a scale per column."""
    row, column = last_first(k, HEIGHT, WIDTH)
    here = (row < m)[:, None] & (column < k)[None, :]
    place = row[:, None] * k + column[None, :]
    scale = tl.load(scale_ptr + column, mask=column < k, other=0.0)
    y = saturated(tl.load(x_ptr + place, mask=here, other=0.0), scale[None, :], fmax)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def cast_rows_kernel(
    x_ptr,
    rows_ptr,
    scale_ptr,
    inverse_ptr,
    m,
    k,
    fmax: tl.constexpr,
    power_of_2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """X8 (m, k), its scales (m) and inverses (m).

    A row of one chunk stays in registers, a longer one is read twice.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    here = (row < m)[:, None] & (column < k)[None, :]
    place = row[:, None] * k + column[None, :]
    x = tl.load(x_ptr + place, mask=here, other=0.0)
    largest = tl.max(magnitude(x), axis=1)
    for number in range(1, CHUNKS):
        more = number * CHUNK + column
        here_too = (row < m)[:, None] & (more < k)[None, :]
        x_too = tl.load(x_ptr + row[:, None] * k + more[None, :], mask=here_too, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude(x_too), axis=1))
    scale = scale_of(largest, fmax, power_of_2)
    tl.store(scale_ptr + row, scale, mask=row < m)
    tl.store(inverse_ptr + row, inverse_of(scale), mask=row < m)
    y = saturated(x, scale[:, None], fmax)
    tl.store(rows_ptr + place, y.to(rows_ptr.dtype.element_ty), mask=here)
    for number in range(1, CHUNKS):
        more = number * CHUNK + column
        here_too = (row < m)[:, None] & (more < k)[None, :]
        place_too = row[:, None] * k + more[None, :]
        y_too = saturated(tl.load(x_ptr + place_too, mask=here_too, other=0.0), scale[:, None], fmax)
        tl.store(rows_ptr + place_too, y_too.to(rows_ptr.dtype.element_ty), mask=here_too)


def cast_rows(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x8 (M, K), its scales (M, 1) and their inverses."""
    x = x.contiguous()
    m, k = x.shape
    out = torch.empty((m, k), dtype=stored_as or dtype, device=x.device)
    scale, inverse = (torch.empty((m, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    rows, chunk, warps = rows_of_a_program(k)
    with torch.cuda.device_of(x):
        cast_rows_kernel[(triton.cdiv(m, rows),)](
            x,
            out,
            scale,
            inverse,
            m,
            k,
            float8_max(dtype),
            power_of_2,
            ROWS=rows,
            CHUNK=chunk,
            CHUNKS=triton.cdiv(k, chunk),
            num_warps=warps,
        )
    return out, scale, inverse


def cast_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x8ᵀ (K, M), its scales (1, K) and their inverses."""
    x = x.contiguous()
    scale, inverse, *_ = _scales(x, dtype, power_of_2, by_row=False)
    if turns_before_casting(x):
        return cast_tiles(x, dtype, stored_as, scale, by_line=True), scale, inverse
    out = torch.empty(x.shape, dtype=stored_as or dtype, device=x.device)
    with torch.cuda.device_of(x):
        cast_by_column_kernel[tiles_of(x)](
            x, scale, out, *x.shape, float8_max(dtype), **tile_of(x)
        )
    return transpose_float8(out), scale, inverse


def cast_rows_and_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, stored_as: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `cast_rows` and then what `cast_columns` give."""
    x = x.contiguous()
    if not turns_before_casting(x):
        return (*cast_rows(x, dtype, power_of_2, stored_as), *cast_columns(x, dtype, power_of_2, stored_as))
    column_scale, column_inverse, row_scale, row_inverse = _scales(x, dtype, power_of_2, by_row=True)
    rows = torch.empty(x.shape, dtype=stored_as or dtype, device=x.device)
    columns = cast_tiles(x, dtype, stored_as, column_scale, by_line=True, rows=rows, row_scale=row_scale)
    return rows, row_scale, row_inverse, columns, column_scale, column_inverse


def _scales(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, by_row: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and inverses of x's columns (1, K) and of its rows (M, 1) or, unless by_row, of none."""
    m, k = x.shape
    lines = k + m * by_row
    amaxes = torch.zeros(lines, dtype=torch.int32, device=x.device)
    scales = tuple(
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((1, k), (1, k), (lines - k, 1), (lines - k, 1))
    )
    across, down = triton.cdiv(k, _AMAXES_WIDTH), triton.cdiv(m, _AMAXES_HEIGHT)
    depth = _AMAXES_DEPTH
    while depth > 1 and across * triton.cdiv(down, depth) < _AMAXES_PROGRAMS:
        depth //= 2
    with torch.cuda.device_of(x):
        amaxes_kernel[(across * triton.cdiv(down, depth),)](
            x,
            amaxes,
            m,
            k,
            depth,
            BY_ROW=by_row,
            HEIGHT=_AMAXES_HEIGHT,
            WIDTH=_AMAXES_WIDTH,
            num_warps=8,
        )
        scales_kernel[(triton.cdiv(lines, _SCALES),)](
            amaxes, *scales, k, lines, float8_max(dtype), power_of_2, BLOCK=_SCALES
        )
    return scales


def rows_of_a_program(k: int) -> tuple[int, int, int]:
    """Of `cast_rows_kernel`: rows (of k elements) that a program owns, elements of a chunk, warps."""
    chunk = triton.next_power_of_2(k)
    chunk = chunk if chunk <= _ROW_CHUNK else _ROW_CHUNK // 2
    rows = max(_ROW_ELEMENTS // chunk, 1)
    return rows, chunk, min(max(rows * chunk // _THREAD_ELEMENTS // 32, 8), 16)
