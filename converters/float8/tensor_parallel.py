"""Tensor-parallel styles of Float8Linear: what is gathered travels in float8, what is added does not.

With dynamic tensorwise scales, over a ``tp`` group of p ranks (s: one scale for the whole tensor, from the
MAX all-reduce of the ranks' amaxes; AG, RS: all-gather, reduce-scatter over the sequence):

    PrepareFloat8ModuleInput
        forward     X8 (B, S, K) = AG( e4m3( X (B, S/p, K), s ) )
        backward    dX (B, S/p, K) = RS( sum of dX (B, S, K) of all users ), hp
    Float8ColwiseParallel, W (N/p, K)
        forward     Y (B, S, N/p) = X8 W8ᵀ
        backward    dY (B, S, N/p) is cast where it is, with the group's s
    Float8RowwiseParallel, W (N, K/p)
        forward     Y (B, S/p, N) = RS( X8 W8ᵀ ), hp;  X (B, S, K/p) is cast where it is
        backward    dY8 (B, S, N) = AG( e5m2( dY (B, S/p, N), s ) )

So wq, wk, wv share one cast and one gather, and so do w1 and w3; a gather moves 1 byte an element. Sums stay
in high precision (hp). Every scalar scale, of weights too, is that of the whole tensor: the float8 elements
are those that one process would have. X8 and dY8 are a `GatheredFloat8`, to autograd a tensor of the compute
dtype, which Float8Linear takes as it is.

Otherwise (rowwise recipes, delayed or static scales, or a sibling that is not float8 and so needs X itself)
gathers are in high precision. Scales per row are then those of the rank's own part of a row where the
contraction is split over ranks: no less accurate, but not bit for bit one process's.

Collectives move bytes (`uint8`), since not every back end knows float8.

Legend: B sequences, S positions, N and K out and in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from converters.float8.cast_config import CastConfig, ScalingType
from converters.float8.config import Float8LinearConfig
from converters.float8.fsdp import plain, shard_for_float8_gather
from converters.float8.gathered import GatheredFloat8
from converters.float8.linear import Float8Linear
from converters.float8.scaling import amax_of, cast_with_scale, scale_from_amax
from parallelisms.tensor_parallel import SharedInputStyle

_SEQUENCE, _WHOLE = Shard(1), Replicate()


@dataclass(frozen=True)
class _Wire:
    """One gather in float8: over which group and dim, and what the elements become."""

    group: str
    ranks: int
    dim: int
    dtype: torch.dtype
    power_of_2: bool
    cast_kernels: str

    def gather(self, local: Tensor) -> Tensor:
        """Cast with the group's scale, and gather bytes."""
        amax = amax_of(local, self.cast_kernels).to(torch.float32)
        amax = funcol.wait_tensor(funcol.all_reduce(amax, "max", self.group))
        scale = scale_from_amax(amax, self.dtype, self.power_of_2)
        data = cast_with_scale(local, scale, self.dtype, self.cast_kernels).contiguous().view(torch.uint8)
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(data, self.ranks, self.group)
        gathered = torch.ops._c10d_functional.wait_tensor(gathered)
        if self.dim:
            gathered = torch.cat(gathered.chunk(self.ranks), self.dim)
        whole = gathered.view(self.dtype)
        return GatheredFloat8(whole, scale, local.dtype)

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        """Sum over the ranks, each keeps its part of `dim`; in the tensor's own dtype."""
        parts = torch.cat(partial.chunk(self.ranks, self.dim)) if self.dim else partial.contiguous()
        out = torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", self.ranks, self.group)
        return torch.ops._c10d_functional.wait_tensor(out)


class _Gather(torch.autograd.Function):
    """Float8 all-gather; its gradient is reduce-scattered in high precision."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, wire: _Wire) -> Tensor:
        ctx.wire = wire
        return wire.gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.reduce_scatter(grads[0]), None


class _ReduceScatter(torch.autograd.Function):
    """High-precision reduce-scatter; its gradient is gathered in float8."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, wire: _Wire) -> Tensor:
        ctx.wire = wire
        return wire.reduce_scatter(partial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.gather(grads[0]), None


@dataclass
class PrepareFloat8ModuleInput(ParallelStyle):
    """Gathers a module's input in float8, once for all Float8Linears inside that read it.

    All readers must be Float8Linears with a dynamic tensorwise input; beside a plain `nn.Linear` use
    `PrepareModuleInput`, which every style here takes too.
    """

    input_layouts: Placement | tuple[Placement | None, ...] = _SEQUENCE
    """How the positional arguments come in: `Shard(d)`, or None for one that is left alone."""
    desired_input_layouts: Placement | tuple[Placement | None, ...] = _WHOLE
    """`Replicate()` for those that are sharded."""
    config: Float8LinearConfig | None = None
    """Casts to follow; those of the first Float8Linear inside the module when unset."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        given, wanted = _as_tuple(self.input_layouts), _as_tuple(self.desired_input_layouts)
        if any(isinstance(g, Shard) != isinstance(w, Replicate) for g, w in zip(given, wanted, strict=True)):
            raise ValueError(
                f"PrepareFloat8ModuleInput: {given} to {wanted}, allowed: Shard to Replicate, None to None"
            )
        config = self.config or _config_inside(module)
        if not gathers_input(config):
            raise ValueError(
                f"PrepareFloat8ModuleInput: the input is {config.cast_config_input.short()}, a float8 gather "
                "needs one dynamic scale for both its GEMMs.\nUse PrepareModuleInput"
            )

        def prepare(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            gathered = [
                arg
                if layout is None
                else _Gather.apply(
                    _local(arg, device_mesh, layout),
                    _wire(device_mesh, layout, config.cast_config_input, config),
                )
                for arg, layout in zip(args, given, strict=False)
            ]
            return (*gathered, *args[len(given) :])

        module.register_forward_pre_hook(prepare)
        return module


class Float8ColwiseParallel(SharedInputStyle):
    """Splits a Float8Linear's out_features over the ranks.

    The input is what `PrepareFloat8ModuleInput` made, or a DTensor, or a local tensor laid out as
    `input_layouts` (replicated when unset). The output is sharded along its last dim, as a local tensor,
    unless `output_layouts` or `use_local_output` say otherwise.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Shard(-1)
        self.use_local_output = use_local_output

    def shared_input(self, module: nn.Module) -> ParallelStyle | None:
        """A float8 gather, where this linear's input can travel in float8."""
        config = _float8_linear(module, self).config
        return PrepareFloat8ModuleInput(config=config) if gathers_input(config) else None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _float8_linear(module, self)
        _split(linear, device_mesh, dim=0, reduced=("weight", "grad_output"), src=self.src_data_rank)

        def prepare(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if isinstance(x, GatheredFloat8):
                return args
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, (self.input_layouts,), run_check=False)
            x = x.redistribute(placements=(Replicate(),))
            return (x.to_local(grad_placements=(Partial(),)), *args[1:])

        def finish(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            if self.use_local_output and self.output_layouts == Shard(-1):
                return y
            out = DTensor.from_local(y, device_mesh, (Shard(y.dim() - 1),), run_check=False)
            out = out.redistribute(placements=(self.output_layouts,))
            return out.to_local() if self.use_local_output else out

        linear.register_forward_pre_hook(prepare)
        linear.register_forward_hook(finish)
        return linear


class Float8RowwiseParallel(ParallelStyle):
    """Splits a Float8Linear's in_features over the ranks; partial outputs are added in high precision.

    The input is sharded along its last dim (a local tensor, or a DTensor that is brought there); the output
    is laid out as `output_layouts` (replicated when unset). With `Shard(d)` the gradient is gathered in
    float8, where it has one dynamic scale.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        self.input_layouts = input_layouts or Shard(-1)
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _float8_linear(module, self)
        if linear.bias is not None:
            raise ValueError("Float8RowwiseParallel: a bias would be added once by each rank; use bias=False")
        _split(linear, device_mesh, dim=1, reduced=("input", "weight"), src=self.src_data_rank)
        config, layout = linear.config, self.output_layouts
        float8_gradient = isinstance(layout, Shard) and one_dynamic_scale(config, "grad_output")

        def prepare(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not isinstance(x, DTensor) and self.input_layouts != Shard(-1):
                x = DTensor.from_local(x, device_mesh, (self.input_layouts,), run_check=False)
            return (_local(x, device_mesh, Shard(x.dim() - 1)), *args[1:])

        def finish(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            if float8_gradient:
                y = _ReduceScatter.apply(
                    y, _wire(device_mesh, layout, config.cast("cast_config_grad_output"), config)
                )
                return y if self.use_local_output else DTensor.from_local(y, device_mesh, (layout,))
            out = DTensor.from_local(y, device_mesh, (Partial(),), run_check=False)
            out = out.redistribute(placements=(layout,))
            return out.to_local() if self.use_local_output else out

        linear.register_forward_pre_hook(prepare)
        linear.register_forward_hook(finish)
        return linear


def gathers_input(config: Float8LinearConfig) -> bool:
    """True where one float8 copy of the input, with one dynamic scale, serves both GEMMs that read it."""
    return one_dynamic_scale(config, "input")


def one_dynamic_scale(config: Float8LinearConfig, tensor: str) -> bool:
    """True where `tensor` (input, weight or grad_output) has one dynamic scale for both its GEMMs."""
    cast = config.cast(f"cast_config_{tensor}")
    dynamic = cast.scaling_type is ScalingType.DYNAMIC and not cast.axiswise
    return dynamic and config.shares_cast(tensor)


def _split(
    linear: Float8Linear, mesh: DeviceMesh, *, dim: int, reduced: tuple[str, ...], src: int | None
) -> None:
    """Make the parameters DTensors sharded along `dim`, and the scales of `reduced` tensors the group's."""
    group = mesh.get_group().group_name
    for name, parameter in list(linear.named_parameters(recurse=False)):
        split = distribute_tensor(plain(parameter.data), mesh, (Shard(dim),), src_data_rank=src)
        split = nn.Parameter(split, requires_grad=parameter.requires_grad)
        if name == "weight" and linear.config.enable_fsdp_float8_all_gather:
            split = shard_for_float8_gather(split, linear.config, group)
        linear.register_parameter(name, split)
    linear.amax_groups = dict.fromkeys(reduced, group)


def _wire(mesh: DeviceMesh, layout: Placement, cast: CastConfig, config: Float8LinearConfig) -> _Wire:
    assert isinstance(layout, Shard)
    group = mesh.get_group().group_name
    return _Wire(
        group,
        mesh.size(),
        layout.dim,
        cast.dtype,
        config.round_scales_to_power_of_2,
        config.cast_kernels,
    )


def _local(x: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    """This rank's part of `x`, which is a DTensor of any layout or that part already."""
    return x.redistribute(mesh, (layout,)).to_local() if isinstance(x, DTensor) else x


def _float8_linear(module: nn.Module, style: ParallelStyle) -> Float8Linear:
    if not isinstance(module, Float8Linear):
        raise ValueError(f"{type(style).__name__} is for a Float8Linear, got {type(module).__name__}")
    return module


def _config_inside(module: nn.Module) -> Float8LinearConfig:
    for child in module.modules():
        if isinstance(child, Float8Linear):
            return child.config
    raise ValueError(f"PrepareFloat8ModuleInput: no Float8Linear in {type(module).__name__}")


def _as_tuple(layouts: Placement | tuple[Placement | None, ...]) -> tuple[Placement | None, ...]:
    return (layouts,) if isinstance(layouts, Placement) else layouts
