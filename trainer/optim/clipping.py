"""Global gradient norm and clipping, over plain and sharded gradients alike.

On a CPU squares are summed in fp64: an fp32 sum over a large tensor is off there in the fifth digit, by an
amount that depends on how the tensor is sharded, and then no two layouts would clip alike. A GPU sums in a
tree, to which fp32 is enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def clip_grad_norm(
    parameters: Iterable[Tensor], max_norm: float, stages: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm` (0: leave them).

    Args:
        parameters: Those that this rank holds.
        max_norm: Largest norm.
        stages: Ranks that hold the other parameters of the model; None where this one holds all.

    Returns:
        The norm before clipping: an fp32 scalar on the device, the same on every rank; reading it is the
        caller's only synchronisation with the device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = total_norm([p.grad for p in parameters if p.grad is not None], stages)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def total_norm(tensors: Iterable[Tensor], stages: dist.ProcessGroup | None = None) -> Tensor:
    """L2 norm of all tensors together, and of those of other `stages`; meshes of sharded ones may differ."""
    groups: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    norms = []
    for group in groups.values():
        each = torch._foreach_norm(group, 2.0, torch.float64 if group[0].device.type == "cpu" else None)
        together = torch.linalg.vector_norm(torch.stack(each))
        norms.append(together.full_tensor() if isinstance(together, DTensor) else together)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if stages is not None:
        squares = norm.square()
        dist.all_reduce(squares, group=stages)
        norm = squares.sqrt()
    return norm.float()
