"""Float8Linear: an `nn.Linear` whose three GEMMs take float8 operands.

Sizes: X (M, K), W (N, K), Y and dY (M, N); M is all leading dims of the input flattened.

    GEMM         left operand (scale)        right operand (scale)     tensorwise       rowwise
    output       X   (M, K)  () or (M, 1)    Wᵀ (K, N)  () or (1, N)   e4m3 x e4m3      e4m3 x e4m3
    grad_input   dY  (M, N)  () or (M, 1)    W  (N, K)  () or (1, K)   e5m2 x e4m3      e4m3 x e4m3
    grad_weight  dYᵀ (N, M)  () or (N, 1)    X  (M, K)  () or (1, K)   e5m2 x e4m3      e4m3 x e4m3

The output has the input's dtype (autocast's, where it is on), grad_input the input's, grad_weight the
weight's. A GEMM whose operands are DISABLED runs in the operands' own dtype. The bias is added outside.

What backward keeps: X and W in high precision and the scalar scales of the forward, so that a scale is
never computed twice from what might by then be other bits; row scales differ between the GEMMs and are
computed from the saved tensors. W itself is saved by reference: under FSDP2 it is freed after forward and
gathered again, where a float8 copy would stay for every layer.

Extra state (delayed and static scales, health statistics) lives in non-persistent fp32 buffers: the
module's state_dict has `weight` and `bias` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from converters.float8.config import CastConfig, Float8LinearConfig, ScalingType
from converters.float8.delayed import record_amax, register_delayed_state, stored_or_dynamic_scale
from converters.float8.fsdp import gathered_float8, plain, shard_for_float8_gather
from converters.float8.gemm import Float8Operand, check_device, high_precision_mm, scaled_mm
from converters.float8.scaling import cast_to_float8, compute_amax, scale_from_amax
from converters.float8.stats import health

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

OPS_TO_SAVE = (torch.ops.aten._scaled_mm.default, torch.ops.aten.amax.default)
"""Ops whose outputs per-op selective checkpoints should save: the GEMM is dear, an amax small and slow."""

_STATE_PREFIX = "float8_"


def _operand(t: Tensor, cast: CastConfig, dim: int, scale: Tensor | None, power_of_2: bool) -> Float8Operand:
    """Cast one operand; `dim` is the GEMM's contraction, used where the scale is one per row."""
    if (gathered := gathered_float8(t)) is not None:
        return gathered
    if scale is None:
        amax = compute_amax(t, dim if cast.axiswise else None)
        scale = scale_from_amax(amax, cast.dtype, power_of_2)
    return Float8Operand(cast_to_float8(t, scale, cast.dtype), scale)


def _global_amax(t: Tensor, group: str | None) -> Tensor:
    """Max |t| over the ranks of `group` that hold the parts of t; of t itself where there is none."""
    amax = compute_amax(t)
    if group is None:
        return amax
    return funcol.wait_tensor(funcol.all_reduce(amax.to(torch.float32), "max", group))


class _Float8Mm(torch.autograd.Function):
    """Y = X Wᵀ and its two gradients, each GEMM as `config` says."""

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
        dy_group: str | None,
        config: Float8LinearConfig,
    ) -> Tensor:
        ctx.config, ctx.dy_group = config, dy_group
        # One tensor must not be passed twice (Dynamo): a None second scale stands for the first.
        if config.shares_cast("input"):
            x_gw_scale = x_scale
        if config.shares_cast("weight"):
            w_gi_scale = w_scale
        ctx.save_for_backward(
            x, weight, x_gw_scale, w_gi_scale, dy_scale, dy_gw_scale, _alias(dy_amax), _alias(dy_stats)
        )
        x_cast, w_cast = config.cast_config_input, config.cast("cast_config_weight")
        if not x_cast.enabled:
            return high_precision_mm(x, weight.t())
        pow2 = config.round_scales_to_power_of_2
        w_fp8 = _operand(weight, w_cast, -1, w_scale, pow2)
        return scaled_mm(
            _operand(x, x_cast, -1, x_scale, pow2),
            w_fp8.t(),
            out_dtype=x.dtype,
            use_fast_accum=config.gemm_config_output.use_fast_accum,
            emulate=config.emulate,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, x_scale, w_scale, dy_scale, dy_gw_scale, dy_amax, dy_stats = ctx.saved_tensors
        config: Float8LinearConfig = ctx.config
        dy_scale, dy_gw_scale = _dy_scales(dy, dy_scale, dy_gw_scale, dy_amax, ctx.dy_group, config)
        if dy_stats is not None:
            _record_health(dy_stats, dy, config.cast_config_grad_output, dy_scale, config)
        grad_x = (
            _grad_input(dy, weight, dy_scale, w_scale, config).to(x.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = _grad_weight(dy, x, dy_gw_scale, x_scale, weight.dtype, config)
        return (grad_x, grad_w, *[None] * 10)


def _grad_input(
    dy: Tensor, weight: Tensor, dy_scale: Tensor | None, w_scale: Tensor | None, config: Float8LinearConfig
) -> Tensor:
    """DX (M, K) = dY (M, N) @ W (N, K)."""
    dy_cast, w_cast = config.cast("cast_config_grad_output"), config.cast("cast_config_weight_for_grad_input")
    if not dy_cast.enabled:
        return high_precision_mm(dy, weight.to(dy.dtype))
    pow2 = config.round_scales_to_power_of_2
    w_fp8 = _operand(weight, w_cast, 0, w_scale, pow2)
    return scaled_mm(
        _operand(dy, dy_cast, -1, dy_scale, pow2),
        w_fp8,
        out_dtype=dy.dtype,
        use_fast_accum=config.gemm_config_grad_input.use_fast_accum,
        emulate=config.emulate,
    )


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    dy_scale: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype,
    config: Float8LinearConfig,
) -> Tensor:
    """DW (N, K) = dYᵀ (N, M) @ X (M, K)."""
    dy_cast = config.cast("cast_config_grad_output_for_grad_weight")
    x_cast = config.cast("cast_config_input_for_grad_weight")
    if not dy_cast.enabled:
        return high_precision_mm(dy.to(x.dtype).t(), x).to(out_dtype)
    pow2 = config.round_scales_to_power_of_2
    return scaled_mm(
        _operand(dy, dy_cast, 0, dy_scale, pow2).t(),
        _operand(x, x_cast, 0, x_scale, pow2),
        out_dtype=out_dtype,
        use_fast_accum=config.gemm_config_grad_weight.use_fast_accum,
        emulate=config.emulate,
    )


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
    casts = (config.cast("cast_config_grad_output"), config.cast("cast_config_grad_output_for_grad_weight"))
    amax = None
    if any(_needs_amax(cast) for cast in casts):
        amax = _global_amax(dy, group)
        if slot is not None:
            record_amax(slot.data if not torch.compiler.is_compiling() else slot, amax)
    pow2 = config.round_scales_to_power_of_2
    first = _scalar_scale(casts[0], amax, stored, pow2)
    if config.shares_cast("grad_output"):
        return first, first
    return first, _scalar_scale(casts[1], amax, stored_gw, pow2)


def _needs_amax(cast: CastConfig) -> bool:
    return cast.enabled and not cast.axiswise and cast.scaling_type is not ScalingType.STATIC


def _scalar_scale(
    cast: CastConfig, amax: Tensor | None, stored: Tensor | None, power_of_2: bool
) -> Tensor | None:
    if cast.scaling_type is ScalingType.STATIC:
        return stored
    if not _needs_amax(cast):
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


def _record_health(
    slot: Tensor, t: Tensor, cast: CastConfig, scale: Tensor | None, config: Float8LinearConfig
) -> None:
    if not cast.enabled or t.numel() == 0 or gathered_float8(t) is not None:
        return
    if scale is None:
        amax = compute_amax(t, -1 if cast.axiswise else None)
        scale = scale_from_amax(amax, cast.dtype, config.round_scales_to_power_of_2)
    target = slot if torch.compiler.is_compiling() else slot.data
    target.copy_(health(t, scale, cast.dtype))


class Float8Linear(nn.Linear):
    """`nn.Linear` in float8; make one with `from_float`, or `convert_to_float8_training` a whole model."""

    weight: nn.Parameter
    config: Float8LinearConfig
    collect_stats: bool
    amax_groups: Mapping[str, str] | None = None
    """Under tensor parallelism: the tensors whose parts lie on several ranks, and these ranks' group."""

    def __init__(self, *args: Any, config: Float8LinearConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_config(config or Float8LinearConfig())

    def _set_config(self, config: Float8LinearConfig) -> None:
        self.config = config
        self.collect_stats = False
        device = self.weight.device
        for name in _CASTS:
            cast = config.cast(name)
            if cast.scaling_type is ScalingType.STATIC:
                self.register_buffer(
                    f"float8_static_{name}", self._initial(name).to(device), persistent=False
                )
        if config.uses_delayed_scaling:
            register_delayed_state(self, config.delayed_scaling_config.history_len, device)
        if config.enable_fsdp_float8_all_gather:
            self.weight = shard_for_float8_gather(self.weight, config)

    def _initial(self, cast_name: str) -> Tensor:
        scale = self.config.cast(cast_name).static_scale
        assert scale is not None
        return scale.detach().to(torch.float32).reshape(()).clone()

    @classmethod
    def from_float(cls, mod: nn.Linear, config: Float8LinearConfig | None = None) -> Float8Linear:
        """A Float8Linear that holds the same parameter objects, hooks and mode as `mod`."""
        new = cls.__new__(cls)
        new.__dict__ = {k: v.copy() if isinstance(v, dict | set) else v for k, v in mod.__dict__.items()}
        new._set_config(config or Float8LinearConfig())
        return new

    def forward(self, input: Tensor) -> Tensor:
        """X (..., K) -> Y (..., N); K and N are this rank's under tensor parallelism."""
        x, weight, bias = _autocast(input, *self._local_parameters())
        n, k = weight.shape
        if input.shape[-1] != k:
            raise ValueError(f"Float8Linear: input has last dim {input.shape[-1]}, expected {k}")
        if not torch.compiler.is_compiling():
            device = x.device
            check_device(
                device.type, device.index, axiswise=self.config.axiswise, emulate=self.config.emulate
            )
        if self.config.force_recompute_fp8_weight_in_bwd and torch.compiler.is_compiling():
            out = checkpoint(self._product, x.reshape(-1, k), weight, use_reentrant=False)
        else:
            out = self._product(x.reshape(-1, k), weight)
        out = out.reshape(*input.shape[:-1], n)
        return out if bias is None else out + bias.to(out.dtype)

    def _local_parameters(self) -> tuple[Tensor, Tensor | None]:
        if self.amax_groups is None:
            return self.weight, self.bias
        weight, bias = cast("tuple[DTensor, DTensor | None]", (self.weight, self.bias))
        return weight.to_local(), None if bias is None else bias.to_local()

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        config = self.config
        with torch.no_grad():
            x_scales = self._scales("input", "cast_config_input_for_grad_weight", x)
            w_scales = self._scales("weight", "cast_config_weight_for_grad_input", weight)
            if self.collect_stats:
                _record_health(self.float8_stats_input, x, config.cast_config_input, x_scales[0], config)
                _record_health(
                    self.float8_stats_weight, weight, config.cast_config_weight, w_scales[0], config
                )
        dy_casts = ("cast_config_grad_output", "cast_config_grad_output_for_grad_weight")
        return _Float8Mm.apply(
            x,
            weight,
            *x_scales,
            *w_scales,
            self._stored_scale("grad_output", dy_casts[0]),
            None if config.shares_cast("grad_output") else self._stored_scale("grad_output", dy_casts[1]),
            self.float8_amax_grad_output if self._records("grad_output") else None,
            self.float8_stats_grad_output if self.collect_stats else None,
            self._amax_group("grad_output"),
            config,
        )

    def _scales(self, tensor: str, second_use: str, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scalar scales of X or W for its two GEMMs, and its amax recorded for delayed scaling."""
        if gathered_float8(t) is not None:
            return None, None
        first_use = f"cast_config_{tensor}"
        casts = (self.config.cast(first_use), self.config.cast(second_use))
        needed = any(_needs_amax(cast) for cast in casts)
        amax = _global_amax(t, self._amax_group(tensor)) if needed else None
        if amax is not None and self._records(tensor):
            record_amax(getattr(self, f"float8_amax_{tensor}"), amax)
        pow2 = self.config.round_scales_to_power_of_2
        first = _scalar_scale(casts[0], amax, self._stored_scale(tensor, first_use), pow2)
        if self.config.shares_cast(tensor):
            return first, None  # as the first
        return first, _scalar_scale(casts[1], amax, self._stored_scale(tensor, second_use), pow2)

    def _amax_group(self, tensor: str) -> str | None:
        return None if self.amax_groups is None else self.amax_groups.get(tensor)

    def _records(self, tensor: str) -> bool:
        # Evaluation must not change how training goes on.
        delayed = self.config.cast(f"cast_config_{tensor}").scaling_type is ScalingType.DELAYED
        return delayed and self.training

    def _stored_scale(self, tensor: str, cast_name: str) -> Tensor | None:
        kind = self.config.cast(cast_name).scaling_type
        if kind is ScalingType.STATIC:
            return getattr(self, f"float8_static_{cast_name}")
        if kind is ScalingType.DELAYED:
            return getattr(self, f"float8_scale_{tensor}")
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Move with the model, but stay fp32 and survive `to_empty`, which fills buffers with rubbish."""
        before = {name: buf for name, buf in self._buffers.items() if name.startswith(_STATE_PREFIX)}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old or new.is_meta:
                continue
            if not old.is_meta:
                self._buffers[name] = old.to(new.device)
            elif name.startswith("float8_static_"):
                self._buffers[name] = self._initial(name.removeprefix("float8_static_")).to(new.device)
            else:
                self._buffers[name] = torch.zeros(old.shape, device=new.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.config.enable_fsdp_float8_all_gather:
            destination[prefix + "weight"] = plain(destination[prefix + "weight"])

    def extra_repr(self) -> str:
        """The linear's sizes, and the casts as type_granularity_dtype."""
        config = self.config
        parts = [super().extra_repr()]
        for label, first, second in (
            ("i", "cast_config_input", "cast_config_input_for_grad_weight"),
            ("w", "cast_config_weight", "cast_config_weight_for_grad_input"),
            ("go", "cast_config_grad_output", "cast_config_grad_output_for_grad_weight"),
        ):
            text, other = config.cast(first).short(), config.cast(second).short()
            parts.append(f"{label}:{text}" if text == other else f"{label}:{text}|{other}")
        return ", ".join(parts) + (", emulated" if config.emulate else "")


_CASTS = (
    "cast_config_input",
    "cast_config_input_for_grad_weight",
    "cast_config_weight",
    "cast_config_weight_for_grad_input",
    "cast_config_grad_output",
    "cast_config_grad_output_for_grad_weight",
)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
