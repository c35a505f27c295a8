"""Global gradient norm and clipping, over plain and sharded gradients alike.

Clipping is a factor, min(1, max_norm / (norm + 1e-6)). An optimizer that takes it (`trainer.optim.one_pass`)
multiplies where it reads the gradient anyway; for others each gradient is read and written once more.

The joint norm is the root of the sum of all gradients' squares. A rank takes the norms of its own parts in
one pass (`kernels.norm`: fp32 on a GPU, fp64 on a CPU), or without one where their squares have been added up
as they were made (`parallelisms.gradient_squares`), and adds up their squares; one number travels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.optim import Optimizer

from kernels.norm import tensor_norms
from parallelisms.gradient_squares import forget, recall
from trainer.optim.one_pass import OnePass

Axes: TypeAlias = tuple[int, ...]
"""Axes of a mesh over which a tensor is split, by number."""


@dataclass
class GradNorms:
    """Norms of single gradients, as they were before clipping: by whom a joint norm is not finite.

    Reading one waits for the device; keeping them costs nothing, since the joint norm is made of them.
    """

    parts: list[tuple[list[int], Tensor]] = field(default_factory=list)
    """(places of gradients, their norms (P,)), a pair for all that are alike; of this rank's parts alone."""

    def not_finite(self) -> list[int]:
        """Places, in the order of the parameters that have gradients, whose norm is not finite here."""
        return sorted(
            place
            for places, norms in self.parts
            for place, is_finite in zip(places, norms.isfinite().tolist(), strict=True)
            if not is_finite
        )


def clip_for(
    optimizer: Optimizer,
    parameters: Iterable[Tensor],
    max_norm: float,
    stages: dist.ProcessGroup | None = None,
    single: GradNorms | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Clip before a step of `optimizer`; arguments as for `clip_grad_norm`.

    Returns:
        The norm before clipping, as there; and the factor that is left to the optimizer's step, an fp32
        scalar on the device: None where gradients are scaled already, or are not to be.
    """
    if not isinstance(optimizer, OnePass):
        return clip_grad_norm(parameters, max_norm, stages, single), None
    norm = total_norm([p.grad for p in parameters if p.grad is not None], stages, single)
    return norm, clip_factor(norm, max_norm) if max_norm > 0 else None


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """By what gradients of a joint `norm` are scaled: the bits of torch's clip_grads_with_norm_."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    stages: dist.ProcessGroup | None = None,
    single: GradNorms | None = None,
) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm` (0: leave them).

    Args:
        parameters: Those that this rank holds; those without a gradient are passed over.
        max_norm: Largest norm.
        stages: Ranks that hold the other parameters of the model; None where this one holds all.
        single: Filled with the gradients' own norms.

    Returns:
        The norm before clipping: an fp32 scalar on the device, the same on every rank; reading it is the
        caller's only synchronisation with the device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = total_norm([p.grad for p in parameters if p.grad is not None], stages, single)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def total_norm(
    tensors: Iterable[Tensor], stages: dist.ProcessGroup | None = None, single: GradNorms | None = None
) -> Tensor:
    """L2 norm of all tensors together, and of those of other `stages`; meshes of sharded ones may differ."""
    groups: dict[tuple[DeviceMesh | None, Axes, torch.dtype], list[tuple[int, Tensor]]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        mesh, axes, local = _own_part(tensor)
        groups[mesh, axes, tensor.dtype].append((place, local))
    squares: dict[DeviceMesh | None, list[tuple[Axes, Tensor]]] = defaultdict(list)
    for (mesh, axes, _), members in groups.items():
        for places, norms in _norms(members):
            if single is not None:
                single.parts.append((places, norms))
            squares[mesh].append((axes, norms.square().sum()))
    forget()
    joint = reduce(torch.add, [_sum_over(mesh, parts) for mesh, parts in squares.items()])
    if stages is not None:
        dist.all_reduce(joint, group=stages)
    return joint.sqrt().float()


def _norms(members: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[list[int], Tensor]]:
    """Places and norms (P,) of tensors of one device and dtype."""
    known = {place: found for place, local in members if (found := recall(local)) is not None}
    if known:
        # Nothing is negative, so this is each one's sum.
        sums = torch._foreach_norm(list(known.values()), 1.0)
        yield list(known), torch.stack(sums).sqrt()
    others = [(place, local) for place, local in members if place not in known]
    if others:
        yield [place for place, _ in others], tensor_norms([local for _, local in others])


def _own_part(tensor: Tensor) -> tuple[DeviceMesh | None, Axes, Tensor]:
    """The mesh of a tensor, the axes over which it is split, and what this rank holds of it."""
    if not isinstance(tensor, DTensor):
        return None, (), tensor
    mesh = tensor.device_mesh
    if any(placement.is_partial() for placement in tensor.placements):  # the squares of a sum
        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(mesh, whole)
    split = [not placement.is_replicate() for placement in tensor.placements]
    return mesh, tuple(i for i in range(mesh.ndim) if split[i] and mesh.size(i) > 1), tensor.to_local()


def _sum_over(mesh: DeviceMesh | None, parts: list[tuple[Axes, Tensor]]) -> Tensor:
    """The sum of squares over all ranks of a mesh, of sums over the parts that each rank holds.

    Args:
        mesh: None for tensors that are not sharded.
        parts: (axes over which tensors are split, sum of squares of this rank's parts of them). What ranks of
            another axis hold too counts for a part of its sum, so that one sum travels for all.
    """
    if mesh is None:
        return reduce(torch.add, [square for _, square in parts])
    travelled = sorted({axis for axes, _ in parts for axis in axes})
    copies = [math.prod(mesh.size(axis) for axis in travelled if axis not in axes) for axes, _ in parts]
    joint = reduce(
        torch.add,
        [s if count == 1 else s / count for (_, s), count in zip(parts, copies, strict=True)],
    )
    if not travelled:
        return joint
    placements = [Partial() if axis in travelled else Replicate() for axis in range(mesh.ndim)]
    return DTensor.from_local(joint, mesh, placements, run_check=False).full_tensor()
