"""From a tensor to its two float8 operands: one for the GEMM that reads its rows, one for its columns.

Each of the three tensors t (R, C) of a linear serves two GEMMs, the first summing over C, the second over R:

    tensor        first GEMM                    second GEMM
    input   (M, K)   output, over K                grad_weight, over M
    weight  (N, K)   output, over K                grad_input, over N
    grad_output (M, N)  grad_input, over N         grad_weight, over M

Axiswise scales are one per row for the first, (R, 1), and one per column for the second, (1, C). Hardware
wants each operand contiguous along its contraction: t8 row-major for the first, t8ᵀ row-major for the
second. `cast_kernels` says who sees to that:

- ``torch``: ops that a compiler fuses with what made t; the layout is left to `gemm.scaled_mm`, which copies.
- ``triton``: the operators of `kernels.cast`, which write the layout that is asked for, or both in one read
  of t. Where Triton does not run they are their PyTorch reference: the same bits, no faster.

Both give the same elements and scales.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from converters.float8.cast_config import CastConfig
from converters.float8.config import SECOND_USE, Float8LinearConfig
from converters.float8.gathered import gathered_float8
from converters.float8.gemm import Float8Operand
from converters.float8.scaling import cast_to_float8, compute_amax, scale_from_amax
from kernels import cast as kernels

TensorName = Literal["input", "weight", "grad_output"]


def operands(
    t: Tensor,
    name: TensorName,
    scales: tuple[Tensor | None, Tensor | None],
    config: Float8LinearConfig,
    *,
    rows: bool,
    columns: bool,
    after: Tensor | None = None,
) -> tuple[Float8Operand | None, Float8Operand | None]:
    """The operands of t's first and second GEMM.

    Args:
        t: (R, C), or what a collective gathered in float8.
        name: Which of a linear's tensors it is.
        scales: Scalar scales for its two uses; None for one per row or column.
        config: Its casts.
        rows: Whether the first is wanted.
        columns: Whether the second is wanted.
        after: In backward, the gradient that started it, to have the second cast there rather than where a
            compiler likes: see `kernels.cast.transpose_float8`.

    Returns:
        Both as (R, C) with scales that broadcast; None for one that is not wanted or stays in high precision.
    """
    first, second = config.cast(f"cast_config_{name}"), config.cast(SECOND_USE[f"cast_config_{name}"])
    rows, columns = rows and first.enabled, columns and second.enabled
    if after is not None and (in_float8 := gathered_float8(after)) is not None:
        after = in_float8.data
    if (gathered := gathered_float8(t)) is not None:
        turned = _turned(gathered, after, config) if columns else None
        return gathered if rows else None, turned
    if rows and columns and config.shares_cast(name):
        return _both(t, first, scales[0], config)
    return (
        _rows(t, first, scales[0], config) if rows else None,
        _columns(t, second, scales[1], config, after) if columns else None,
    )


def _turned(gathered: Float8Operand, after: Tensor | None, config: Float8LinearConfig) -> Float8Operand:
    if config.cast_kernels != "triton":
        return gathered
    return Float8Operand(kernels.transpose_float8(gathered.data, after).t(), gathered.scale)


def _both(
    t: Tensor, cast: CastConfig, scale: Tensor | None, config: Float8LinearConfig
) -> tuple[Float8Operand, Float8Operand]:
    if config.cast_kernels != "triton":
        first = _rows(t, cast, scale, config)
        return first, _columns(t, cast, scale, config) if cast.axiswise else first
    if cast.axiswise:
        made = kernels.cast_rows_and_columns(t, cast.dtype, config.round_scales_to_power_of_2)
        t8_turned, *column_scales = made[3:]
        return Float8Operand(*made[:3]), Float8Operand(t8_turned.t(), *column_scales)
    assert scale is not None
    t8, t8_turned = kernels.cast_both(t, scale, cast.dtype)
    return Float8Operand(t8, scale), Float8Operand(t8_turned.t(), scale)


def _rows(t: Tensor, cast: CastConfig, scale: Tensor | None, config: Float8LinearConfig) -> Float8Operand:
    if config.cast_kernels != "triton":
        return _plain(t, cast, -1, scale, config)
    if cast.axiswise:
        return Float8Operand(*kernels.cast_rows(t, cast.dtype, config.round_scales_to_power_of_2))
    assert scale is not None
    return Float8Operand(kernels.cast_float8(t, scale, cast.dtype), scale)


def _columns(
    t: Tensor,
    cast: CastConfig,
    scale: Tensor | None,
    config: Float8LinearConfig,
    after: Tensor | None = None,
) -> Float8Operand:
    if config.cast_kernels != "triton":
        return _plain(t, cast, 0, scale, config)
    if cast.axiswise:
        turned, *scales = kernels.cast_columns(t, cast.dtype, config.round_scales_to_power_of_2, after)
        return Float8Operand(turned.t(), *scales)
    assert scale is not None
    return Float8Operand(kernels.cast_transposed(t, scale, cast.dtype, after).t(), scale)


def _plain(
    t: Tensor, cast: CastConfig, dim: int, scale: Tensor | None, config: Float8LinearConfig
) -> Float8Operand:
    if scale is None:
        amax = compute_amax(t, dim if cast.axiswise else None)
        scale = scale_from_amax(amax, cast.dtype, config.round_scales_to_power_of_2)
    return Float8Operand(cast_to_float8(t, scale, cast.dtype), scale)
