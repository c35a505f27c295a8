"""The three GEMMs of a float8 linear, as one autograd function.

Sizes: X (M, K), W (N, K), Y and dY (M, N); M is all leading dims of the input flattened.

    GEMM         left operand (scale)        right operand (scale)     tensorwise       rowwise
    output       X   (M, K)  () or (M, 1)    Wᵀ (K, N)  () or (1, N)   e4m3 x e4m3      e4m3 x e4m3
    grad_input   dY  (M, N)  () or (M, 1)    W  (N, K)  () or (1, K)   e5m2 x e4m3      e4m3 x e4m3
    grad_weight  dYᵀ (N, M)  () or (N, 1)    X  (M, K)  () or (1, K)   e5m2 x e4m3      e4m3 x e4m3

The output has the input's dtype (autocast's, where it is on), grad_input the input's, grad_weight the
weight's. A GEMM whose operands are DISABLED runs in the operands' own dtype.

What backward keeps, besides the scalar scales of the forward (a scale is never computed twice from what
might by then be other bits; row scales differ between the GEMMs and come with their operand, and their
inverses too where Triton casts):

- X in high precision and cast again; or X8ᵀ, already turned, where `saved_input` is ``float8``. A compiler
  that sees X cast again may do that in forward and keep X8ᵀ, which serves all linears that read X, unless
  `force_recompute_fp8_input_in_bwd` forbids it: then it keeps X if something else needs it, or what it can
  make X of.
- W by reference: under FSDP2 it is freed after forward and gathered again, where a float8 copy would stay for
  every layer. Compiled, with Triton's casts and without `force_recompute_fp8_weight_in_bwd`, W8ᵀ: one read of
  W less, one byte an element more. A weight that came in float8 is kept as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from converters.float8.cast_config import CastConfig, ScalingType
from converters.float8.config import SECOND_USE, Float8LinearConfig
from converters.float8.delayed import record_amax, stored_or_dynamic_scale
from converters.float8.gathered import gathered_float8
from converters.float8.gemm import Float8Operand, high_precision_mm, scaled_mm
from converters.float8.operands import operands
from converters.float8.scaling import amax_of, compute_amax, scale_from_amax
from converters.float8.stats import health


class Plan(NamedTuple):
    """What the function needs to know besides tensors."""

    config: Float8LinearConfig
    dy_group: str | None
    """Under tensor parallelism: the ranks that hold the parts of dY."""
    keep_x: bool
    """Save X8ᵀ rather than X."""
    keep_w: bool
    """Save W8ᵀ rather than W."""


def plan(x: Tensor, weight: Tensor, dy_group: str | None, config: Float8LinearConfig) -> Plan:
    """What to keep of this forward for its backward, if it will have one."""
    trains = torch.is_grad_enabled()
    keep_x = config.saved_input == "float8" and gathered_float8(x) is None
    keep_w = (
        config.cast_kernels == "triton"
        and torch.compiler.is_compiling()
        and not config.force_recompute_fp8_weight_in_bwd
        and gathered_float8(weight) is None
    )
    return Plan(
        config, dy_group, trains and keep_x and weight.requires_grad, trains and keep_w and x.requires_grad
    )


class Float8Mm(torch.autograd.Function):
    """Y = X Wᵀ and its two gradients, each GEMM as the plan's config says."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor | None,
        x_gw_scale: Tensor | None,
        w_scale: Tensor | None,
        w_gi_scale: Tensor | None,
        dy_scale: Tensor | None,
        dy_gw_scale: Tensor | None,
        dy_amax: Tensor | None,
        dy_stats: Tensor | None,
        how: Plan,
    ) -> Tensor:
        """Y (M, N); the scales are None where they are one per row or a tensor came in float8."""
        config = how.config
        # One tensor must not be passed twice (Dynamo): a None second scale stands for the first.
        if config.shares_cast("input"):
            x_gw_scale = x_scale
        if config.shares_cast("weight"):
            w_gi_scale = w_scale
        x_rows, x_columns = operands(x, "input", (x_scale, x_gw_scale), config, rows=True, columns=how.keep_x)
        w_rows, w_columns = operands(
            weight, "weight", (w_scale, w_gi_scale), config, rows=True, columns=how.keep_w
        )
        ctx.config, ctx.dy_group = config, how.dy_group
        ctx.x_dtype, ctx.w_dtype = x.dtype, weight.dtype
        ctx.kept_x, ctx.kept_w = x_columns is not None, w_columns is not None
        ctx.save_for_backward(
            *((x, x_gw_scale, None) if x_columns is None else x_columns.t()),
            *((weight, w_gi_scale, None) if w_columns is None else w_columns.t()),
            dy_scale,
            dy_gw_scale,
            _alias(dy_amax),
            _alias(dy_stats),
        )
        if x_rows is None or w_rows is None:
            return high_precision_mm(x, weight.t())
        return scaled_mm(
            x_rows,
            w_rows.t(),
            out_dtype=x.dtype,
            use_fast_accum=config.gemm_config_output.use_fast_accum,
            emulate=config.emulate,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of X and W where they are needed."""
        (dy,) = grads
        x, x_scale, x_inverse, weight, w_scale, w_inverse, *stored, dy_amax, dy_stats = ctx.saved_tensors
        config: Float8LinearConfig = ctx.config
        scales = _dy_scales(dy, stored[0], stored[1], dy_amax, ctx.dy_group, config)
        if dy_stats is not None:
            record_health(dy_stats, dy, config.cast_config_grad_output, scales[0], config)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dy_rows, dy_columns = operands(dy, "grad_output", scales, config, rows=needs_x, columns=needs_w)
        grad_x = grad_w = None
        if needs_x:
            w = Float8Operand(weight, w_scale, w_inverse).t() if ctx.kept_w else None
            if w is None:
                w = operands(weight, "weight", (None, w_scale), config, rows=False, columns=True, after=dy)[1]
            grad_x = _grad_input(dy, weight, dy_rows, w, config).to(ctx.x_dtype)
        if needs_w:
            x_fp8 = Float8Operand(x, x_scale, x_inverse).t() if ctx.kept_x else None
            if x_fp8 is None:
                x_fp8 = _cast_again(x, x_scale, dy, config)
            grad_w = _grad_weight(dy, x, dy_columns, x_fp8, ctx.w_dtype, config)
        return (grad_x, grad_w, *[None] * 9)


def _cast_again(
    x: Tensor, scale: Tensor | None, dy: Tensor, config: Float8LinearConfig
) -> Float8Operand | None:
    """X for the grad_weight GEMM, where forward has not kept it in float8."""
    came_in_float8 = gathered_float8(x) is not None
    late = config.force_recompute_fp8_input_in_bwd or came_in_float8
    if late and not came_in_float8 and torch.compiler.is_compiling():
        x = _made_again(x, dy)
    after = dy if late else None
    return operands(x, "input", (None, scale), config, rows=False, columns=True, after=after)[1]


def _made_again(x: Tensor, dy: Tensor) -> Tensor:
    """X, in a form that lets a compiler make it again in backward.

    What an op reads that cannot be fused, as a cast kernel, the partitioner keeps, however cheap to make
    (torch 2.11 to 2.13: `is_materialized_backwards`). What a fusible op reads it may make again, and it fuses
    the two: a choice between X and X is such an op, and one that waits for dY cannot be moved to forward.
    """
    in_float8 = gathered_float8(dy)
    first = (dy if in_float8 is None else in_float8.data)[:1, :1].to(torch.float32)
    return torch.where(first > 0, x, x)


def _grad_input(
    dy: Tensor, weight: Tensor, dy_fp8: Float8Operand | None, w_fp8: Float8Operand | None, config: Any
) -> Tensor:
    """DX (M, K) = dY (M, N) @ W (N, K)."""
    if dy_fp8 is None or w_fp8 is None:
        return high_precision_mm(dy, weight.to(dy.dtype))
    return scaled_mm(
        dy_fp8,
        w_fp8,
        out_dtype=dy.dtype,
        use_fast_accum=config.gemm_config_grad_input.use_fast_accum,
        emulate=config.emulate,
    )


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    dy_fp8: Float8Operand | None,
    x_fp8: Float8Operand | None,
    out_dtype: torch.dtype,
    config: Float8LinearConfig,
) -> Tensor:
    """DW (N, K) = dYᵀ (N, M) @ X (M, K)."""
    if dy_fp8 is None or x_fp8 is None:
        return high_precision_mm(dy.to(x.dtype).t(), x).to(out_dtype)
    return scaled_mm(
        dy_fp8.t(),
        x_fp8,
        out_dtype=out_dtype,
        use_fast_accum=config.gemm_config_grad_weight.use_fast_accum,
        emulate=config.emulate,
    )


def global_amax(t: Tensor, group: str | None, config: Float8LinearConfig) -> Tensor:
    """Max |t| over the ranks of `group` that hold the parts of t; of t itself where there is none."""
    amax = amax_of(t, config.cast_kernels)
    if group is None:
        return amax
    return funcol.wait_tensor(funcol.all_reduce(amax.to(torch.float32), "max", group))


def _dy_scales(
    dy: Tensor,
    stored: Tensor | None,
    stored_gw: Tensor | None,
    slot: Tensor | None,
    group: str | None,
    config: Float8LinearConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """Scalar scales of dY for its two GEMMs (None where per row or absent); its amax is recorded."""
    if gathered_float8(dy) is not None:
        return None, None
    casts = (config.cast("cast_config_grad_output"), config.cast(SECOND_USE["cast_config_grad_output"]))
    amax = None
    if any(needs_amax(cast) for cast in casts):
        amax = global_amax(dy, group, config)
        if slot is not None:
            record_amax(slot.data if not torch.compiler.is_compiling() else slot, amax)
    pow2 = config.round_scales_to_power_of_2
    first = scalar_scale(casts[0], amax, stored, pow2)
    if config.shares_cast("grad_output"):
        return first, first
    return first, scalar_scale(casts[1], amax, stored_gw, pow2)


def needs_amax(cast: CastConfig) -> bool:
    """Whether a cast's scale is made of the whole tensor's amax, now or later."""
    return cast.enabled and not cast.axiswise and cast.scaling_type is not ScalingType.STATIC


def scalar_scale(
    cast: CastConfig, amax: Tensor | None, stored: Tensor | None, power_of_2: bool
) -> Tensor | None:
    """The scale of a cast that has one for the tensor; None for any other cast."""
    if cast.scaling_type is ScalingType.STATIC:
        return stored
    if not needs_amax(cast):
        return None
    assert amax is not None
    dynamic = scale_from_amax(amax, cast.dtype, power_of_2)
    if cast.scaling_type is ScalingType.DELAYED:
        assert stored is not None
        return stored_or_dynamic_scale(stored, dynamic)
    return dynamic


def _alias(t: Tensor | None) -> Tensor | None:
    """A view without a shared version counter: backward writes to it, and other graphs may hold it saved."""
    return t if t is None or torch.compiler.is_compiling() else t.data


def record_health(
    slot: Tensor, t: Tensor, cast: CastConfig, scale: Tensor | None, config: Float8LinearConfig
) -> None:
    """Write the numbers of `stats.health` of t's first cast to `slot`."""
    if not cast.enabled or t.numel() == 0 or gathered_float8(t) is not None:
        return
    if scale is None:
        amax = compute_amax(t, -1 if cast.axiswise else None)
        scale = scale_from_amax(amax, cast.dtype, config.round_scales_to_power_of_2)
    target = slot if torch.compiler.is_compiling() else slot.data
    target.copy_(health(t, scale, cast.dtype))
