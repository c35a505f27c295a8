"""Casts to float8 that read a tensor once, for GEMMs that want both operands contraction-contiguous.

A tensor t (M, K) serves two GEMMs: one sums over K and reads its rows, the other sums over M and reads its
columns, that is the rows of tᵀ. So it is wanted as t8 (M, K) and as t8ᵀ (K, M), both row-major. With one
scale for all of t, or with one per row for t8 and one per column for t8ᵀ:

    op                      reads and writes, bytes an element (bf16 in)             from PyTorch ops
    amax                    2                                                        6
    cast_float8             2 + 1                                                    27
    cast_each_into          2 + 1, of many tensors in one launch                     27
      without a scale       4 + 2, fp32 to bf16                                      4 + 2
    cast_both               2 + 1 + 1                                                29
    scale_and_cast_both     2 + 2 + 1 + 1, less what L2 holds of the second 2        35
      with an amax          2 + 1 + 1                                                29
    cast_transposed         2 + 1                                                    29
    transpose_float8        1 + 1                                                    2, uncoalesced
    cast_rows               2 + 1; rows of more than 32,768 elements 2 + 2 + 1       33
    cast_columns            2 + 2 + 1                                                35
    cast_rows_and_columns   2 + 2 + 1 + 1                                            68

fp32 tensors read 4 where bf16 ones read 2, and get t8ᵀ from a t8 that was written: 1 + 1 more, and where t8
has scales by row a t8 of its own (`kernels.triton.cast` says why). The last column is eager PyTorch, whose
steps are passes over fp32 temporaries; a compiler fuses them, but stores t8ᵀ from a row-wise walk, a byte
here and a byte there.

Scales by row and column come with their inverses, fp32(1 / s), which GEMMs multiply by: to make them of the
scales takes a launch before each GEMM.

All follow `kernels.scaling` to the last bit: explicit saturation, NaN stays NaN, scales divided in fp64.
M and K may be zero and need not be divisible by anything. A dtype that the Triton kernels do not know (fp64
in; AMD's fnuz formats out) takes the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.operators import operator
from kernels.scaling import cast_to_float8, compute_amax, inverse_scale, scale_from_amax
from kernels.support import runs_float8_triton, runs_triton

_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def _launches(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> bool:
    return x.numel() > 0 and x.dtype in _INPUTS and dtype in _FORMATS and runs_float8_triton(x.device)


def cast_both_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x8 (M, K) and x8ᵀ (K, M) of x (M, K), with one scale."""
    x8 = cast_to_float8(x, scale, dtype).contiguous()
    return x8, _transposed(x8)


def scale_and_cast_both_reference(
    x: Tensor, dtype: torch.dtype, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both layouts, the scale of `amax` (x's own unless given) and its inverse, fp32 scalars."""
    scale = scale_from_amax(compute_amax(x) if amax is None else amax, dtype)
    return *cast_both_reference(x, scale, dtype), scale, inverse_scale(scale)


def cast_rows_reference(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x8 (M, K) of x (M, K), its scales (M, 1), each of its row's amax, and their inverses (M, 1)."""
    scale = scale_from_amax(compute_amax(x, -1), dtype, power_of_2)
    return cast_to_float8(x, scale, dtype).contiguous(), scale, inverse_scale(scale)


def cast_columns_reference(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x8ᵀ (K, M) of x (M, K), its scales (1, K), each of its column's amax, and their inverses (1, K)."""
    scale = scale_from_amax(compute_amax(x, 0), dtype, power_of_2)
    return _transposed(cast_to_float8(x, scale, dtype)), scale, inverse_scale(scale)


def _transposed(x: Tensor) -> Tensor:
    # clone and not contiguous(): of one row or column the latter is the same memory, which no op may return.
    return x.t().clone(memory_format=torch.contiguous_format)


@operator("amax")
def amax(x: Tensor) -> Tensor:
    """Max |x| as a scalar of x's dtype; of nothing it is 0."""
    if _launches(x):
        from kernels.triton import amax as kernel

        return kernel.amax(x)
    return compute_amax(x)


@amax.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(())


@operator("cast_float8")
def cast_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X8 of x's shape (any), row-major, with one scale."""
    if _launches(x, dtype):
        from kernels.triton import cast

        return cast.cast_float8(x, scale, dtype)
    return cast_to_float8(x, scale, dtype).contiguous()


@cast_float8.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("octavo::cast_float8_into", mutates_args=("out",))
def cast_float8_into(out: Tensor, x: Tensor, scale: Tensor) -> None:
    """`cast_float8` of x into `out`, of x's shape, contiguous and of a float8 dtype."""
    if _launches(x, out.dtype):
        from kernels.triton import cast

        cast.cast_float8_into(out, x, scale, out.dtype)
    else:
        out.copy_(cast_to_float8(x, scale, out.dtype))


@cast_float8_into.register_fake
def _(out: Tensor, x: Tensor, scale: Tensor) -> None:
    return None


@torch.library.custom_op("octavo::cast_each_into", mutates_args=("outs",))
def cast_each_into(
    outs: list[Tensor], tensors: list[Tensor], scales: list[Tensor], dtype: torch.dtype
) -> None:
    """`cast_float8` of each of P tensors, or with no scales ``t.to(dtype)`` of each, in one launch.

    Args:
        outs: Where the elements go, P contiguous tensors of as many bytes as these take, of any dtype.
        tensors: Of one device and dtype, contiguous, of any shape.
        scales: () fp32 each, P; or none at all, where elements are rounded as torch rounds, infinities kept.
        dtype: A float8 format with scales, another dtype without.

    Raises:
        ValueError: a number, a size, a layout, a dtype or a device is another.
    """
    _check_each(outs, tensors, scales, dtype)
    if not tensors:
        return
    if _launches_each(tensors[0], scales, dtype):
        from kernels.triton.cast_each import launch

        launch(outs, tensors, scales, dtype)
    else:
        cast_each_into_reference(outs, tensors, scales, dtype)


@cast_each_into.register_fake
def _(outs: list[Tensor], tensors: list[Tensor], scales: list[Tensor], dtype: torch.dtype) -> None:
    return None


def cast_each_into_reference(
    outs: list[Tensor], tensors: list[Tensor], scales: list[Tensor], dtype: torch.dtype
) -> None:
    """As `cast_each_into`, by torch."""
    if not scales:
        torch._foreach_copy_([out.view(dtype) for out in outs], [t.view(-1) for t in tensors])
        return
    for out, t, scale in zip(outs, tensors, scales, strict=True):
        out.view(torch.uint8).copy_(cast_to_float8(t, scale, dtype).view(torch.uint8).view(-1))


def _launches_each(t: Tensor, scales: list[Tensor], dtype: torch.dtype) -> bool:
    if not scales:
        return t.dtype in _INPUTS and dtype in _INPUTS and runs_triton(t.device)
    return t.dtype in _INPUTS and dtype in _FORMATS and runs_float8_triton(t.device)


def _check_each(outs: list[Tensor], tensors: list[Tensor], scales: list[Tensor], dtype: torch.dtype) -> None:
    """Raise ValueError for what a kernel that is given addresses would not notice."""
    expected = len(tensors) if dtype.itemsize == 1 else 0
    if len(outs) != len(tensors) or len(scales) != expected:
        raise ValueError(
            f"cast_each_into: {len(tensors)} tensors to {dtype}, {len(scales)} scales, {len(outs)} outputs"
        )
    if len({(t.device, t.dtype) for t in tensors}) > 1:
        raise ValueError("cast_each_into: tensors of several devices or dtypes")
    for out, t in zip(outs, tensors, strict=True):
        if out.nbytes != t.numel() * dtype.itemsize:
            raise ValueError(f"cast_each_into: {tuple(t.shape)} as {dtype} into {out.nbytes} bytes")
        is_between = out.storage_offset() * out.itemsize % dtype.itemsize
        if not (out.is_contiguous() and t.is_contiguous()) or is_between or out.device != t.device:
            raise ValueError("cast_each_into: not contiguous, between two elements, or on several devices")
    for scale in scales:
        if scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != tensors[0].device:
            raise ValueError(f"cast_each_into: a scale {scale.dtype} {tuple(scale.shape)} on {scale.device}")


@operator("cast_both")
def cast_both(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `cast_both_reference`."""
    if _launches(x, dtype):
        from kernels.triton import cast

        return cast.cast_both(x, scale, dtype)
    return cast_both_reference(x, scale, dtype)


@cast_both.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[1], x.shape[0]), dtype=dtype)


@operator("scale_and_cast_both")
def scale_and_cast_both(
    x: Tensor, dtype: torch.dtype, amax: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `scale_and_cast_both_reference`; `amax` is an fp32 scalar.

    One operator, so that the cast follows the amax at once and finds in L2 what that has left there. Where
    the amax is at hand it saves the kernel that would make a scale of it.
    """
    if _launches(x, dtype):
        from kernels.triton import cast

        return cast.scale_and_cast_both(x, dtype, amax)
    return scale_and_cast_both_reference(x, dtype, amax)


@scale_and_cast_both.register_fake
def _(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, inverse = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((x.shape[1], x.shape[0]), dtype=dtype),
        scale,
        inverse,
    )


@operator("cast_transposed")
def cast_transposed(x: Tensor, scale: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """x8ᵀ (K, M) of x (M, K), with one scale; `after` as in `transpose_float8`."""
    if _launches(x, dtype):
        from kernels.triton import cast

        return cast.cast_transposed(x, scale, dtype)
    return _transposed(cast_to_float8(x, scale, dtype))


@cast_transposed.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]), dtype=dtype)


@operator("transpose_float8")
def transpose_float8(x: Tensor, after: Tensor | None = None) -> Tensor:
    """xᵀ (C, R), row-major, of a float8 matrix x (R, C).

    `after` is not read. A tensor that only backward has keeps a compiler from doing this in forward already,
    which would hold xᵀ where x is at hand anyway.
    """
    if x.numel() > 0 and x.element_size() == 1 and runs_float8_triton(x.device):
        from kernels.triton import cast

        return cast.transpose_float8(x)
    return _transposed(x)


@transpose_float8.register_fake
def _(x: Tensor, after: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]))


@operator("cast_rows")
def cast_rows(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `cast_rows_reference`."""
    if _launches(x, dtype):
        from kernels.triton import cast_by_line

        return cast_by_line.cast_rows(x, dtype, power_of_2)
    return cast_rows_reference(x, dtype, power_of_2)


@cast_rows.register_fake
def _(x: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor, Tensor]:
    scale, inverse = (x.new_empty((x.shape[0], 1), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), scale, inverse


@operator("cast_columns")
def cast_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cast_columns_reference`; `after` as in `transpose_float8`."""
    if _launches(x, dtype):
        from kernels.triton import cast_by_line

        return cast_by_line.cast_columns(x, dtype, power_of_2)
    return cast_columns_reference(x, dtype, power_of_2)


@cast_columns.register_fake
def _(
    x: Tensor, dtype: torch.dtype, power_of_2: bool, after: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    scale, inverse = (x.new_empty((1, x.shape[1]), dtype=torch.float32) for _ in range(2))
    return x.new_empty((x.shape[1], x.shape[0]), dtype=dtype), scale, inverse


@operator("cast_rows_and_columns")
def cast_rows_and_columns(
    x: Tensor, dtype: torch.dtype, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `cast_rows` and then what `cast_columns` give: x8, x8ᵀ, and after each its scales and inverses."""
    if _launches(x, dtype):
        from kernels.triton import cast_by_line

        return cast_by_line.cast_rows_and_columns(x, dtype, power_of_2)
    return (*cast_rows_reference(x, dtype, power_of_2), *cast_columns_reference(x, dtype, power_of_2))


@cast_rows_and_columns.register_fake
def _(
    x: Tensor, dtype: torch.dtype, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, k = x.shape
    row_scale, row_inverse = (x.new_empty((m, 1), dtype=torch.float32) for _ in range(2))
    column_scale, column_inverse = (x.new_empty((1, k), dtype=torch.float32) for _ in range(2))
    x8, x8t = (x.new_empty(shape, dtype=dtype) for shape in ((m, k), (k, m)))
    return x8, row_scale, row_inverse, x8t, column_scale, column_inverse
