"""FSDP2 with a float8 all-gather: a weight shard that is cast before it travels.

    shard (fp32 or bf16)  --s = scale(global amax)-->  float8 shard  --all-gather, 1 byte/element-->  W8

The global amax is a MAX all-reduce per weight, or with `precompute_float8_dynamic_scale_for_fsdp`
one for all weights after the optimizer step. The scale does not travel: all ranks compute it from
the same amax. W8 serves both GEMMs that read the weight, hence tensorwise scales only. A weight that
tensor parallelism has split before takes the maximum over that group too: its scale stays that of the
whole weight, and each rank gathers its part of it.

What travels is a view of the float8 bytes in another dtype. FSDP2 copies all inputs of a unit into one
buffer, by elements of their dtype, or by bytes where dtypes differ, and its copy moves four elements an
access: 4 bytes, half the chip's speed or less. A unit's norms travel in the compute dtype; so where that is
bf16, weights go as bf16 too, two elements in one, and the buffer is one of bf16. Where they cannot (fp32
norms, unevenly sharded weights), they go as bytes.

FSDP2 finds `fsdp_pre_all_gather` and `fsdp_post_all_gather` on the local tensor of a sharded
parameter; so the parameter is a `FSDPFloat8Shard`, a wrapper that behaves as the plain tensor in it.
What is gathered is a `GatheredFloat8` (`converters.float8.gathered`). Neither reaches a checkpoint: `plain`
unwraps them for the state dict.

A precomputed scale is forgotten when the shard is written to, so that a forward after a load or a
step without precompute computes its own. With `keep_float8_shards` the cast shard lives as long: forward,
backward and all micro-batches of a step gather what was cast once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils import _pytree as pytree

from converters.float8.gathered import GatheredFloat8, Wrapper
from converters.float8.scaling import (
    amax_of,
    cast_with_scale,
    cast_with_scale_into,
    scale_from_amax,
)
from parallelisms.uncast import UncastShard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from converters.float8.config import Float8LinearConfig

aten = torch.ops.aten
# Ops after which a shard is still a shard: FSDP2 builds, pads, moves and views its parameters with them.
_KEEP_SHARD = {
    aten.detach.default,
    aten.alias.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_empty.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.view.default,
    aten.as_strided.default,
    aten.split.Tensor,
    aten.clone.default,
    aten._to_copy.default,
    aten._pin_memory.default,
}


_PASSES_AS_BF16 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Formats that torch's copies of bf16 leave alone. On a GPU these go through fp32, which keeps every bf16 but
a NaN's bits; its upper byte is 0x7f or 0xff, a NaN in these formats too. To AMD's formats it is a number."""


class GatherSettings(NamedTuple):
    """How a shard is cast."""

    dtype: torch.dtype
    power_of_2: bool
    tp_group: str | None = None
    """Name of the tensor-parallel group whose ranks hold the other parts of the weight."""
    cast_kernels: str = "torch"
    keep: bool = False
    """Keep the cast shard until the weight changes."""


class _Kept(NamedTuple):
    """A cast shard, and what it was made of: it is good while these are still the shard's."""

    data: Tensor
    scale: Tensor
    version: int
    """In-place writes that the tensor had seen, also such as went past the wrapper."""


class FSDPFloat8Shard(Wrapper):
    """A weight (or a shard of one) that FSDP2 gathers in float8.

    Who writes to `_tensor` past the dispatcher (a kernel of one's own) sets `_scale` to None.
    """

    _tensor: Tensor
    _settings: GatherSettings
    _scale: Tensor | None
    _kept: _Kept | None

    @staticmethod
    def __new__(cls, tensor: Tensor, settings: GatherSettings) -> FSDPFloat8Shard:  # noqa: D102
        self = Wrapper._make(cls, tensor, tensor.dtype)
        self._tensor, self._settings, self._scale, self._kept = tensor, settings, None, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FSDPFloat8Shard({self._tensor!r})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_tensor"], self._settings

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> FSDPFloat8Shard:
        return FSDPFloat8Shard(inner["_tensor"], meta)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shards = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, FSDPFloat8Shard)]
        if func._schema.is_mutable:
            for shard in shards:
                shard._scale = shard._kept = None

        args, kwargs = pytree.tree_map_only(FSDPFloat8Shard, lambda t: t._tensor, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func not in _KEEP_SHARD:
            return out
        settings = shards[0]._settings
        return pytree.tree_map_only(Tensor, lambda t: FSDPFloat8Shard(t, settings), out)

    def global_scale(self, mesh: DeviceMesh | None) -> Tensor:
        """The scale of the whole weight: the precomputed one, or from an all-reduce over the shards."""
        if self._scale is not None:
            return self._scale
        settings = self._settings
        amax = amax_of(self._tensor, settings.cast_kernels).to(torch.float32)
        groups: list[Any] = []
        if mesh is not None and mesh.size(mesh.ndim - 1) > 1:
            groups.append(mesh.get_group(mesh.ndim - 1))
        if settings.tp_group is not None:
            groups.append(_resolve_process_group(settings.tp_group))
        for group in groups:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        return scale_from_amax(amax, settings.dtype, settings.power_of_2)

    def float8(self, mesh: DeviceMesh | None, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """The shard in float8 and its scale: those that were kept, or new ones.

        Args:
            mesh: Its last axis holds the other shards.
            rows: As many as other ranks have, at least the shard's own; zeros follow these.
        """
        settings, kept = self._settings, self._kept
        if kept is not None and kept.scale is self._scale and kept.version == self._tensor._version:
            return kept.data, kept.scale
        if kept is not None and kept.version != self._tensor._version and kept.scale is self._scale:
            self._scale = None  # written past the wrapper: the scale is as stale as the cast
        self._kept = kept = None  # its memory is there for the new one
        scale = self.global_scale(mesh)
        if rows is None or rows == len(self._tensor):
            data = cast_with_scale(self._tensor, scale, settings.dtype, settings.cast_kernels)
        else:
            data = self._tensor.new_zeros((rows, *self._tensor.shape[1:]), dtype=settings.dtype)
            cast_with_scale_into(data[: len(self._tensor)], self._tensor, scale, settings.cast_kernels)
        if settings.keep:
            self._scale, self._kept = scale, _Kept(data, scale, self._tensor._version)
        return data, scale

    def cast_whole_into(self, out: Tensor) -> Tensor:
        """Cast the shard, which is all of the weight, to `out`; returns its scale."""
        scale = self.global_scale(None)
        cast_with_scale_into(out, self._tensor, scale, self._settings.cast_kernels)
        return scale

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: Any, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What travels: the float8 shard, cast or not yet, seen as bf16 or as bytes. What stays: a scale."""
        # Sharded along rows, so along them alone there may be unequal shards.
        settings, ranks = self._settings, mesh.size(mesh.ndim - 1)
        even = outer_size[0] % ranks == 0
        # Every rank of the mesh has to decide alike. FSDP2 wants uneven shards in the size of their elements.
        as_bf16 = (
            (mp_policy.param_dtype or self.dtype) == torch.bfloat16
            and settings.dtype in _PASSES_AS_BF16
            and self.numel() % 2 == 0
            and even
        )
        if even and not settings.keep:
            scale = self.global_scale(mesh)
            travels_as = torch.bfloat16 if as_bf16 else torch.uint8
            uncast = UncastShard(
                self._tensor,
                settings.dtype,
                scale=scale,
                travels_as=travels_as,
                by_kernels=settings.cast_kernels == "triton",
            )
            return (uncast,), (scale,)
        data, scale = self.float8(mesh, None if even else -(-outer_size[0] // ranks))
        return (data.view(-1).view(torch.bfloat16) if as_bf16 else data.view(torch.uint8),), (scale,)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Any:
        """The gathered weight, or on a later gather the new scale for it."""
        (data,), (scale,) = all_gather_outputs, metadata
        if out is None:
            return GatheredFloat8(data.view(self._settings.dtype), scale, param_dtype), (data,)
        gathered = _local(out)
        assert isinstance(gathered, GatheredFloat8), type(gathered)
        gathered._scale = scale
        return None


# FSDP2 asks for the signature at every gather of every weight: 5 us where it is at hand, 16 where not.
FSDPFloat8Shard.fsdp_pre_all_gather.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    FSDPFloat8Shard.fsdp_pre_all_gather
)


def _local(t: Tensor) -> Tensor:
    local = getattr(t, "_local_tensor", t)  # a DTensor's, without importing DTensor
    return local.data if isinstance(local, nn.Parameter) and type(local) is nn.Parameter else local


def shard_for_float8_gather(
    weight: Tensor, config: Float8LinearConfig, tp_group: str | None = None
) -> nn.Parameter:
    """The same values as a parameter whose shards FSDP2 gathers in float8.

    Args:
        weight: A plain tensor, or with `tp_group` a DTensor that is split over that group.
        config: Its casts.
        tp_group: Name of the group that holds the other parts of the weight.
    """
    settings = GatherSettings(
        config.cast("cast_config_weight").dtype,
        config.round_scales_to_power_of_2,
        tp_group,
        config.cast_kernels,
        config.keep_float8_shards,
    )
    return nn.Parameter(
        _map_local(weight.detach(), lambda t: FSDPFloat8Shard(t, settings)),
        requires_grad=weight.requires_grad,
    )


def plain(t: Tensor) -> Tensor:
    """The same values as a plain tensor, or as a DTensor of plain tensors; shares memory."""
    if not isinstance(getattr(t, "_local_tensor", t), FSDPFloat8Shard):
        return t
    return _map_local(t, lambda local: cast("FSDPFloat8Shard", local)._tensor)


def _map_local(t: Tensor, wrap: Callable[[Tensor], Tensor]) -> Tensor:
    """`wrap` of a plain tensor, or of a DTensor's local part."""
    local = getattr(t, "_local_tensor", t)  # a DTensor's, without importing DTensor where there is none
    if local is t:
        return wrap(t)
    from torch.distributed.tensor import DTensor

    assert isinstance(t, DTensor)
    return DTensor.from_local(
        wrap(local), t.device_mesh, t.placements, run_check=False, shape=t.size(), stride=t.stride()
    )


def sharding_axes(mesh: DeviceMesh) -> DeviceMesh:
    """A parameter's mesh as one axis, without the replicas: they hold the same."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "dp_replicate")
    if not names or mesh.ndim == 1:
        return mesh
    inner = mesh if len(names) == mesh.ndim else mesh[names]
    return inner if inner.ndim == 1 else inner._flatten()


@torch.no_grad()
def weight_before_gather(weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype] | None:
    """This rank's part of a weight that is gathered in float8, its scale, and the dtype; None for others.

    Every rank of the parameter's mesh must call it: the scale may take an all-reduce.
    """
    shard = getattr(weight, "_local_tensor", weight)
    if not isinstance(shard, FSDPFloat8Shard):
        return None
    mesh = getattr(weight, "device_mesh", None)
    scale = shard.global_scale(None if mesh is None else sharding_axes(mesh))
    return shard._tensor, scale, shard._settings.dtype
