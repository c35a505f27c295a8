"""Casts to float8 in Triton: the kernels behind `kernels.cast` with one scale, and what launches them.

x is (m, k) row-major. Memory sets the pace of all of them, so each element is read from it once a pass, and
every load and store moves 16 bytes a thread (rows of x8 and of x8ᵀ; sizes divisible by 16, as Triton sees
from the arguments; others are right but slower). Measured on an H100, (8192, 14336) bf16 with both layouts
written: 0.162 ms, 2.9 TB/s. Instructions come next: 1,000 a thread and tile would fill, by their
number, nearly half of that time, so the clamp is one instruction and not two.

- `cast_kernel`: elementwise.
- `cast_tiles_kernel`: a tile in, its float8 form out twice, the second time turned through shared memory.
- `scale_and_cast_tiles_kernel`: the same, with the one scale made on the way, of an amax or of its parts'.
- `transpose_kernel`: what its name says.

The last elements are cast first: they are what an amax before has left in L2. The tiles that the first
programs cast are on the chip before that amax has ended (`kernels.triton.overlap`).

A tile is turned in the 2 bytes of its input, before it is cast. The other order is wrong: where a pair of
float8 is both stored and picked apart for shared memory, ptxas (12.8) folds the conversion into the packing
(`F2FP ... PACK_AB_MERGE_C`) and leaves the other use an undefined register. Triton itself moves the turning
of fp32 behind the cast, so fp32 is cast in one kernel and turned, as bytes, in another.
`tests.kernels.hopper` refuses machine code that reads an undefined register.

`dtype` gives the format, whose largest value clamps; `stored_as`, where given, is the dtype that is written
in its place, so that the arithmetic can be looked at before it is rounded to float8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scaling import float8_max, inverse_scale, scale_from_amax
from kernels.triton.amax import amax as amax_of
from kernels.triton.amax import amaxes_of_parts
from kernels.triton.magnitude import magnitude
from kernels.triton.overlap import APART, after_former, overlapping
from kernels.triton.scale import inverse_of, scale_of

_EVEN = {"HEIGHT": 64, "WIDTH": 128, "num_warps": 4}
"""Rows, columns and warps of a tile that is cast: 64 elements a thread, and a line of L2 or half of one in
either direction of float8. Squares of 128 with 8 warps took up to 2 us longer a tensor: fewer programs, which
all load, compute and store at the same time."""
_UNEVEN = {"HEIGHT": 64, "WIDTH": 64, "num_warps": 8}
"""Where a thread's elements are not adjacent and each has an address of its own: registers hold 16."""
_TURNED, _TURNED_WARPS = 128, 8
"""Rows and columns of a tile of bytes that is only turned, and its warps."""
_ELEMENTS = 4096
"""Elements a program casts in `cast_kernel`: 16 a thread of 8 warps, one store each."""


@triton.jit
def saturated(x, scale, fmax: tl.constexpr):
    """fp32(x) * scale, clamped; NaN stays NaN."""
    return tl.clamp(x.to(tl.float32) * scale, -fmax, fmax, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def cast_kernel(x_ptr, scale_ptr, out_ptr, n, fmax: tl.constexpr, BLOCK: tl.constexpr):
    """Elementwise cast with one scale, the last block first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0)
    y = saturated(x, tl.load(scale_ptr), fmax)
    tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=index < n)


@triton.jit
def last_first(k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The rows and the columns of this program's tile; the last tiles come first."""
    tile = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    across = tl.cdiv(k, WIDTH)
    return (tile // across) * HEIGHT + tl.arange(0, HEIGHT), (tile % across) * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _load_tile(x_ptr, row, column, m, k):
    here = (row < m)[:, None] & (column < k)[None, :]
    return tl.load(x_ptr + row[:, None] * k + column[None, :], mask=here, other=0.0)


@triton.jit
def _store_rows(x, scale, rows_ptr, row, column, m, k, fmax: tl.constexpr):
    here = (row < m)[:, None] & (column < k)[None, :]
    y = saturated(x, scale, fmax)
    tl.store(rows_ptr + row[:, None] * k + column[None, :], y.to(rows_ptr.dtype.element_ty), mask=here)


@triton.jit
def _store_columns(x, scale, columns_ptr, row, column, m, k, fmax: tl.constexpr):
    there = (column < k)[:, None] & (row < m)[None, :]
    y = saturated(tl.trans(x), scale, fmax)
    place = column[:, None] * m + row[None, :]
    tl.store(columns_ptr + place, y.to(columns_ptr.dtype.element_ty), mask=there)


@triton.jit
def cast_tiles_kernel(
    x_ptr,
    row_scale_ptr,
    column_scale_ptr,
    rows_ptr,
    columns_ptr,
    m,
    k,
    fmax: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    BY_LINE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """X8ᵀ (k, m) and, with WRITE_ROWS, x8 (m, k), of x whose elements are 2 bytes.

    One scale, column_scale_ptr's, or BY_LINE one per column for x8ᵀ and one per row for x8. OVERLAPS where
    the kernel before is the one that made the scales, and x was there before that began.
    """
    row, column = last_first(k, HEIGHT, WIDTH)
    x = _load_tile(x_ptr, row, column, m, k)
    after_former(OVERLAPS)
    if BY_LINE:
        row_scale = tl.load(row_scale_ptr + row, mask=(row < m) & WRITE_ROWS, other=0.0)[:, None]
        column_scale = tl.load(column_scale_ptr + column, mask=column < k, other=0.0)[:, None]
    else:
        row_scale = tl.load(column_scale_ptr)
        column_scale = row_scale
    if WRITE_ROWS:
        _store_rows(x, row_scale, rows_ptr, row, column, m, k, fmax)
    _store_columns(x, column_scale, columns_ptr, row, column, m, k, fmax)


@triton.jit
def _scale_of_parts(amaxes_ptr, scale_ptr, inverse_ptr, fmax: tl.constexpr, PARTS: tl.constexpr):
    """The scale of the largest of PARTS amaxes; the first program stores it and its inverse."""
    amax = tl.max(magnitude(tl.load(amaxes_ptr + tl.arange(0, PARTS))), axis=0)
    scale = scale_of(amax, fmax, False)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
        tl.store(inverse_ptr, inverse_of(scale))
    return scale


@triton.jit
def scale_and_cast_tiles_kernel(
    x_ptr,
    amaxes_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    inverse_ptr,
    m,
    k,
    fmax: tl.constexpr,
    PARTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Both layouts as above, the one scale being that of the largest of PARTS amaxes; it and its inverse.

    OVERLAPS where the kernel before is the one that made the amaxes, and x was there before that began:
    then the tile is loaded while that ends. Elsewhere the scale comes before the tile: the division takes
    registers that a tile in hand would need.
    """
    row, column = last_first(k, HEIGHT, WIDTH)
    if OVERLAPS:
        x = _load_tile(x_ptr, row, column, m, k)
        after_former(OVERLAPS)
        scale = _scale_of_parts(amaxes_ptr, scale_ptr, inverse_ptr, fmax, PARTS)
    else:
        scale = _scale_of_parts(amaxes_ptr, scale_ptr, inverse_ptr, fmax, PARTS)
        x = _load_tile(x_ptr, row, column, m, k)
    _store_rows(x, scale, rows_ptr, row, column, m, k, fmax)
    _store_columns(x, scale, columns_ptr, row, column, m, k, fmax)


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
    if not turns_before_casting(x):
        rows = cast_float8(x, scale, dtype, stored_as)
        return rows, transpose_float8(rows)
    rows = torch.empty(x.shape, dtype=stored_as or dtype, device=x.device)
    return rows, cast_tiles(x, dtype, stored_as, scale, rows=rows)


def scale_and_cast_both(
    x: Tensor,
    dtype: torch.dtype,
    amax: Tensor | None = None,
    stored_as: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x8 (M, K), x8ᵀ (K, M), their scale and its inverse, fp32 scalars; `amax` is x's unless given."""
    x = x.contiguous()
    if not turns_before_casting(x):
        scale = scale_from_amax(amax_of(x) if amax is None else amax, dtype)
        return *cast_both(x, scale, dtype, stored_as), scale, inverse_scale(scale)
    amaxes = amaxes_of_parts(x) if amax is None else amax
    overlap = overlapping(x) if amax is None else APART
    rows = torch.empty(x.shape, dtype=stored_as or dtype, device=x.device)
    columns = torch.empty((x.shape[1], x.shape[0]), dtype=stored_as or dtype, device=x.device)
    scale, inverse = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        scale_and_cast_tiles_kernel[tiles_of(x)](
            x,
            amaxes,
            rows,
            columns,
            scale,
            inverse,
            *x.shape,
            float8_max(dtype),
            PARTS=amaxes.numel(),
            **tile_of(x),
            **overlap,
        )
    return rows, columns, scale, inverse


def cast_transposed(
    x: Tensor, scale: Tensor, dtype: torch.dtype, stored_as: torch.dtype | None = None
) -> Tensor:
    """x8ᵀ (K, M)."""
    if not turns_before_casting(x):
        return transpose_float8(cast_float8(x, scale, dtype, stored_as))
    return cast_tiles(x, dtype, stored_as, scale)


def transpose_float8(x: Tensor) -> Tensor:
    """xᵀ (C, R) of x (R, C)."""
    x = x.contiguous()
    out = torch.empty((x.shape[1], x.shape[0]), dtype=x.dtype, device=x.device)
    moved = torch.uint8 if x.element_size() == 1 else x.dtype
    tile = _TURNED if _is_even(x) else _TURNED // 2
    grid = (triton.cdiv(x.shape[0], tile) * triton.cdiv(x.shape[1], tile),)
    with torch.cuda.device_of(x):
        transpose_kernel[grid](x.view(moved), out.view(moved), *x.shape, TILE=tile, num_warps=_TURNED_WARPS)
    return out


def turns_before_casting(x: Tensor) -> bool:
    """Whether x goes through `cast_tiles_kernel`: see the module's docstring."""
    return x.element_size() == 2


def _is_even(x: Tensor) -> bool:
    """Whether each thread's elements are adjacent, in x and in what is turned."""
    return x.shape[0] % 16 == x.shape[1] % 16 == 0


def tile_of(x: Tensor) -> dict[str, int]:
    """Rows and columns of a tile of x that is cast, and its warps."""
    return _EVEN if _is_even(x) else _UNEVEN


def tiles_of(x: Tensor) -> tuple[int]:
    """The grid: one program a tile of x."""
    tile = tile_of(x)
    return (triton.cdiv(x.shape[0], tile["HEIGHT"]) * triton.cdiv(x.shape[1], tile["WIDTH"]),)


def cast_tiles(
    x: Tensor,
    dtype: torch.dtype,
    stored_as: torch.dtype | None,
    scale: Tensor,
    *,
    by_line: bool = False,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """x8ᵀ, with one scale or, by line, one per column; fills rows, by line with row_scale.

    By line the scales come from the launch before this one, and x from one before that.
    """
    x = x.contiguous()
    columns = torch.empty((x.shape[1], x.shape[0]), dtype=stored_as or dtype, device=x.device)
    with torch.cuda.device_of(x):
        cast_tiles_kernel[tiles_of(x)](
            x,
            # Where a tensor is not there another stands in for it, and the kernel leaves it alone.
            scale if row_scale is None else row_scale,
            scale,
            columns if rows is None else rows,
            columns,
            *x.shape,
            float8_max(dtype),
            WRITE_ROWS=rows is not None,
            BY_LINE=by_line,
            **tile_of(x),
            **(overlapping(x) if by_line else APART),
        )
    return columns
