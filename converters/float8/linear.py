"""Float8Linear: an `nn.Linear` whose three GEMMs take float8 operands.

The module holds parameters, settings and scales; `matmul` is the arithmetic, `operands` the casts. The bias
is added outside the GEMM.

Extra state (delayed and static scales, health statistics) lives in non-persistent fp32 buffers: the
module's state_dict has `weight` and `bias` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from converters.float8.cast_config import ScalingType
from converters.float8.config import Float8LinearConfig
from converters.float8.delayed import record_amax, register_delayed_state
from converters.float8.fsdp import plain, shard_for_float8_gather
from converters.float8.gathered import gathered_float8
from converters.float8.gemm import check_device
from converters.float8.matmul import Float8Mm, global_amax, needs_amax, plan, record_health, scalar_scale

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

OPS_TO_SAVE = (
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten.amax.default,
    torch.ops.octavo.amax.default,
)
"""Ops whose outputs per-op selective checkpoints should save: the GEMM is dear (though of a block's matmuls
only every second one is kept: `parallelisms.activation_checkpoint`), an amax small and slow.

A cast is neither: 4 bytes an element moved, against 1 kept for as long as an activation. `CASTS_TO_SAVE` are
for those who ask for it with ``saved_input = "float8"``: then backward finds X8ᵀ and computes neither X nor
its casts again (compiled, unless that linear's GEMM is computed again, which reads X8; in eager mode a saved
op keeps all its outputs, so X8 too).
"""

CASTS_TO_SAVE = (
    torch.ops.octavo.cast_both.default,
    torch.ops.octavo.cast_rows_and_columns.default,
)

_STATE_PREFIX = "float8_"


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
        recompute = self.config.force_recompute_fp8_weight_in_bwd and self.config.cast_kernels == "torch"
        if recompute and torch.compiler.is_compiling():
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
                record_health(self.float8_stats_input, x, config.cast_config_input, x_scales[0], config)
                record_health(
                    self.float8_stats_weight, weight, config.cast_config_weight, w_scales[0], config
                )
        dy_casts = ("cast_config_grad_output", "cast_config_grad_output_for_grad_weight")
        return Float8Mm.apply(
            x,
            weight,
            *x_scales,
            *w_scales,
            self._stored_scale("grad_output", dy_casts[0]),
            None if config.shares_cast("grad_output") else self._stored_scale("grad_output", dy_casts[1]),
            self.float8_amax_grad_output if self._records("grad_output") else None,
            self.float8_stats_grad_output if self.collect_stats else None,
            plan(x, weight, self._amax_group("grad_output"), config),
        )

    def _scales(self, tensor: str, second_use: str, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scalar scales of X or W for its two GEMMs, and its amax recorded for delayed scaling."""
        if gathered_float8(t) is not None:
            return None, None
        first_use = f"cast_config_{tensor}"
        casts = (self.config.cast(first_use), self.config.cast(second_use))
        needed = any(needs_amax(cast) for cast in casts)
        amax = global_amax(t, self._amax_group(tensor), self.config) if needed else None
        if amax is not None and self._records(tensor):
            record_amax(getattr(self, f"float8_amax_{tensor}"), amax)
        pow2 = self.config.round_scales_to_power_of_2
        first = scalar_scale(casts[0], amax, self._stored_scale(tensor, first_use), pow2)
        if self.config.shares_cast(tensor):
            return first, None  # as the first
        return first, scalar_scale(casts[1], amax, self._stored_scale(tensor, second_use), pow2)

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
