"""Scales of all weights that FSDP2 gathers in float8, computed together between two steps.

    amax of each shard --one MAX all-reduce for all--> amaxes --> scales, kept by the shards for their casts

An amax costs a read of the shard, 4 bytes a parameter, unless an optimizer finds it as it writes the
parameter (`trainer.optim.one_pass`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from converters.float8.fsdp import FSDPFloat8Shard, sharding_axes
from converters.float8.scaling import compute_amax, scale_from_amax


def gathered_in_float8(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` whose shards travel in float8."""
    return [p for p in model.parameters() if isinstance(getattr(p, "_local_tensor", None), FSDPFloat8Shard)]


@torch.no_grad()
def precompute_float8_dynamic_scale_for_fsdp(
    model: nn.Module, amaxes: Mapping[Tensor, Tensor] | None = None
) -> None:
    """The scales of all float8-gathered weights with one all-reduce, after the optimizer step.

    Args:
        model: After `fully_shard`.
        amaxes: Parameter -> fp32 scalar, the largest magnitude of this rank's shard, of all of these weights,
            where somebody has found them on the way (`trainer.optim.one_pass`); otherwise they are read.
    """
    params = gathered_in_float8(model)
    if not params:
        warnings.warn(
            "precompute_float8_dynamic_scale_for_fsdp has no effect: no parameter is gathered in float8",
            stacklevel=3,
        )
        return
    shards: list[FSDPFloat8Shard] = [p._local_tensor for p in params]
    largest = amaxes_of_shards(shards) if amaxes is None else torch.stack([amaxes[p] for p in params])
    mesh = sharding_axes(params[0].device_mesh)
    if mesh.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.get_group())
    by_kind: dict[Any, list[tuple[FSDPFloat8Shard, Tensor]]] = {}
    for shard, amax in zip(shards, largest.unbind(), strict=True):
        by_kind.setdefault((shard._settings.dtype, shard._settings.power_of_2), []).append((shard, amax))
    for (dtype, power_of_2), members in by_kind.items():
        # No indexing by a list of numbers, which would travel to the device first and be waited for.
        scales = scale_from_amax(torch.stack([amax for _, amax in members]), dtype, power_of_2)
        for (shard, _), scale in zip(members, _apart(scales), strict=True):
            shard._scale = scale


def _apart(scalars: Tensor) -> tuple[Tensor, ...]:
    """Each of `scalars` at a 16-byte boundary: a compiled block copies an input that begins elsewhere."""
    spread = scalars.new_empty(len(scalars), 16 // scalars.element_size())
    spread[:, 0] = scalars
    return spread[:, 0].unbind()


@torch.no_grad()
def read_amaxes_of_changed_weights(model: nn.Module, amaxes: Mapping[Tensor, Tensor]) -> None:
    """Fill `amaxes` for weights that nobody's step has written: new and loaded ones.

    An optimizer that skips its next step leaves amaxes as they are.

    Args:
        model: After `fully_shard`.
        amaxes: As `precompute_float8_dynamic_scale_for_fsdp` takes them.
    """
    changed = [p for p in gathered_in_float8(model) if p._local_tensor._scale is None]
    if changed:
        found = amaxes_of_shards([p._local_tensor for p in changed])
        torch._foreach_copy_([amaxes[p] for p in changed], list(found.unbind()))


def amaxes_of_shards(shards: list[FSDPFloat8Shard]) -> Tensor:
    """(n,) fp32: each shard's amax."""
    if shards[0]._settings.cast_kernels != "triton":
        return torch.stack([compute_amax(shard._tensor).to(torch.float32) for shard in shards])
    # One read of each, many tensors a launch. A rank may hold nothing of a small weight, and an empty norm
    # is undefined.
    amaxes = torch.zeros(len(shards), device=shards[0]._tensor.device)
    slots = [slot for slot, shard in zip(amaxes.unbind(), shards, strict=True) if shard._tensor.numel()]
    filled = [shard._tensor for shard in shards if shard._tensor.numel()]
    if filled:
        torch._foreach_copy_(slots, list(torch._foreach_norm(filled, ord=float("inf"))))
    return amaxes
