"""Casts to float8 with a scale per row and per column, in Triton: further kernels behind `kernels.cast`.

As in `kernels.triton.cast`, whose tiles write what is turned:

- `amaxes_kernel`: of rows and columns in one pass, by tiles; a program writes those of what it has seen.
- `scales_kernel`: the largest of these, and scales and inverses of them; fp64 division is too slow to be
  repeated in every tile.
- `cast_rows_kernel`: a program owns whole rows and holds them in registers between amax and cast.
- `cast_by_column_kernel`: elementwise, for what is not turned before it is cast.

Amaxes of parts, one a row and 128 columns and one a column and 128 rows, are 3 % of a bf16 tensor's bytes,
to be written and read. In return nothing has to be zeroed before, no atomics follow a tile, and each kernel
begins while the one before ends (`kernels.triton.overlap`). Microseconds on an H100, with atomics and so:
(8192, 4096) 56 and 32, (4096, 4096) 35 and 19, (8192, 14336) 160 and 92, (8192, 1024) 23 and 14.

So scales by row and column cost 2 + 2 + 1 + 1 bytes an element in bf16. At 3.0 TB/s that is 67 us for
(8192, 4096), 235 us for (8192, 14336) and 17 us for (8192, 1024), less what the second pass finds in L2;
measured, with 4 us for a launch, 72, 249 and 22.
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
from kernels.triton.overlap import after_former, overlapping
from kernels.triton.scale import inverse_of, scale_of

_AMAXES = {"HEIGHT": 32, "WIDTH": 128, "DEPTH": 4, "num_warps": 2}
"""Of `amaxes_kernel`: a tile's rows and columns, 8 loads of 16 bytes a thread in bf16; the tiles that a
program goes down; its warps."""
_SCALES, _PARTS = 64, 16
"""Of `scales_kernel`: scales that a program makes, and parts that it looks at at a time."""
_ROW_ELEMENTS, _ROW_CHUNK, _THREAD_ELEMENTS = 8192, 32768, 32
"""Of `cast_rows_kernel`: elements that a program holds at least and at most, and a thread (the longest rows:
twice as many)."""


@triton.jit
def amaxes_kernel(
    x_ptr,
    amaxes_ptr,
    m,
    k,
    BY_ROW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Bits of the amaxes of parts of columns (down, k) and, BY_ROW, behind them of parts of rows (across, m).

    A program goes down through DEPTH tiles: that is its part of these columns, and a tile one of its rows.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(k, WIDTH)
    side, level = program % across, program // across
    row_amaxes_ptr = amaxes_ptr + tl.num_programs(0).to(tl.int64) // across * k + side * m
    column = side * WIDTH + tl.arange(0, WIDTH)
    largest = tl.zeros([HEIGHT, WIDTH], tl.int32)
    after_former(OVERLAPS)
    number = 0
    while number < DEPTH:
        row = (level * DEPTH + number) * HEIGHT + tl.arange(0, HEIGHT)
        # Past the last row it is the last again: no mask of rows, which costs more than this.
        place = tl.minimum(row, m - 1)[:, None] * k + column[None, :]
        bits = magnitude(tl.load(x_ptr + place, mask=(column < k)[None, :], other=0.0))
        largest = tl.maximum(largest, bits)
        if BY_ROW:
            tl.store(row_amaxes_ptr + row, tl.max(bits, axis=1), mask=row < m)
        number += 1
    tl.store(amaxes_ptr + level * k + column, tl.max(largest, axis=0), mask=column < k)


@triton.jit
def scales_kernel(
    amaxes_ptr,
    column_scale_ptr,
    column_inverse_ptr,
    row_scale_ptr,
    row_inverse_ptr,
    m,
    k,
    down,
    across,
    fmax: tl.constexpr,
    power_of_2: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Scales and inverses of `amaxes_kernel`'s parts: the first cdiv(k, BLOCK) programs make the columns'."""
    program = tl.program_id(0)
    of_columns = tl.cdiv(k, BLOCK)
    is_row = program >= of_columns
    parts, lines = tl.where(is_row, across, down), tl.where(is_row, m, k)
    line = tl.where(is_row, program - of_columns, program) * BLOCK + tl.arange(0, BLOCK)
    amaxes_ptr += tl.where(is_row, down, 0).to(tl.int64) * k
    largest = tl.zeros([PARTS, BLOCK], tl.int32)
    after_former(OVERLAPS)
    first = 0
    while first < parts:
        part = first + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & (line < lines)[None, :]
        place = part.to(tl.int64)[:, None] * lines + line[None, :]
        largest = tl.maximum(largest, tl.load(amaxes_ptr + place, mask=here, other=0))
        first += PARTS
    scale = scale_of(tl.max(largest, axis=0), fmax, power_of_2)
    inverse = inverse_of(scale)
    row_here, column_here = (line < m) & is_row, (line < k) & (program < of_columns)
    tl.store(column_scale_ptr + line, scale, mask=column_here)
    tl.store(column_inverse_ptr + line, inverse, mask=column_here)
    tl.store(row_scale_ptr + line, scale, mask=row_here)
    tl.store(row_inverse_ptr + line, inverse, mask=row_here)


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
        cast_by_column_kernel[tiles_of(x)](x, scale, out, *x.shape, float8_max(dtype), **tile_of(x))
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
    rows = m * by_row
    scales = tuple(
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((1, k), (1, k), (rows, 1), (rows, 1))
    )
    across, down = triton.cdiv(k, _AMAXES["WIDTH"]), triton.cdiv(m, _AMAXES["HEIGHT"] * _AMAXES["DEPTH"])
    amaxes = torch.empty(down * k + across * rows, dtype=torch.int32, device=x.device)
    overlap = overlapping(x)
    with torch.cuda.device_of(x):
        amaxes_kernel[(across * down,)](x, amaxes, m, k, BY_ROW=by_row, **_AMAXES, **overlap)
        scales_kernel[(triton.cdiv(k, _SCALES) + triton.cdiv(rows, _SCALES),)](
            amaxes,
            *scales,
            m,
            k,
            down,
            across,
            float8_max(dtype),
            power_of_2,
            BLOCK=_SCALES,
            PARTS=_PARTS,
            **overlap,
        )
    return scales


def rows_of_a_program(k: int) -> tuple[int, int, int]:
    """Of `cast_rows_kernel`: rows (of k elements) that a program owns, elements of a chunk, warps."""
    chunk = triton.next_power_of_2(k)
    chunk = chunk if chunk <= _ROW_CHUNK else _ROW_CHUNK // 2
    rows = max(_ROW_ELEMENTS // chunk, 1)
    return rows, chunk, min(max(rows * chunk // _THREAD_ELEMENTS // 32, 8), 16)
