"""Global gradient norm and clipping, over plain and sharded gradients alike.

Clipping is a factor, min(1, max_norm / (norm + 1e-6)). An optimizer that takes it (`trainer.optim.one_pass`)
multiplies where it reads the gradient anyway; for others each gradient is read and written once more.

On a CPU squares are summed in fp64: an fp32 sum over a large tensor is off there in the fifth digit, by an
amount that depends on how the tensor is sharded, and then no two layouts would clip alike. A GPU sums in a
tree, to which fp32 is enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.optim.one_pass import OnePass


@dataclass
class GradNorms:
    """Norms of single gradients, as they were before clipping: by whom a joint norm is not finite.

    Reading one waits for the device; keeping them costs nothing, since the joint norm is made of them.
    """

    parts: list[tuple[list[int], Tensor]] = field(default_factory=list)
    """(places of gradients, their norms (P,)), a pair for each mesh; of this rank's shards alone."""

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


def total_norm(
    tensors: Iterable[Tensor], stages: dist.ProcessGroup | None = None, single: GradNorms | None = None
) -> Tensor:
    """L2 norm of all tensors together, and of those of other `stages`; meshes of sharded ones may differ."""
    groups: dict[tuple[DeviceMesh | None, torch.dtype], list[tuple[int, Tensor]]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        groups[mesh, tensor.dtype].append((place, tensor))
    norms = []
    for members in groups.values():
        group = [tensor for _, tensor in members]
        each = torch._foreach_norm(
            group, 2.0, torch.float64 if group[0].device.type == "cpu" else torch.float32
        )
        stacked = torch.stack(each)
        if single is not None:
            local = stacked.to_local() if isinstance(stacked, DTensor) else stacked
            single.parts.append(([place for place, _ in members], local))
        together = torch.linalg.vector_norm(stacked)
        norms.append(together.full_tensor() if isinstance(together, DTensor) else together)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if stages is not None:
        squares = norm.square()
        dist.all_reduce(squares, group=stages)
        norm = squares.sqrt()
    return norm.float()
