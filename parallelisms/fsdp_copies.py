"""FSDP2's collectives as copies between the GPUs of a host, without the buffers between.

FSDP2 (torch.distributed.fsdp, 2.11 to 2.13) moves every weight three times to gather it, and every gradient
twice before it travels: into one buffer, over the wire, out of the buffer, because a collective wants one
tensor. Copies between GPUs (`parallelisms.peer_memory`) do not:

    gather     shard -> peer memory; barrier; copies of all parts to where the whole weight lies; barrier
    reduce     barrier; copies of all parts of a gradient into their owners' peer memory; barrier; sum

A shard is cast on its way (`parallelisms.uncast`). A kernel on the compute stream is saved for each: the copy
out of the gather buffer (4 bytes a bf16 weight, of which FSDP2 makes one for every gather) and the copy into
the reduction's (4 bytes a bf16 gradient).

FSDP2 asks for the two buffers, calls its own operators to copy into and out of them, and hands them to an
object of ours. A `Placeholder` is given in a buffer's place: a tensor without memory, to which those
operators only say what would have been copied.

A gathered weight must have a place to lie in while the compute stream is still busy: so they are kept in
place over the steps. That is what ``fsdp_reshard_after_forward = "never"`` holds at its peak anyway; where
weights are freed after forward, NCCL gathers them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

# `FSDPModule.set_custom_all_gather` is public, what it takes has no public home yet (torch 2.13).
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from parallelisms.peer_memory import Lent, PeerMemory, Piece
from parallelisms.uncast import copy_shards

aten, fsdp = torch.ops.aten, torch.ops.fsdp


class Placeholder(torch.Tensor):
    """Stands for a buffer (numel,), in any shape."""

    base: Placeholder | None = None
    """What this is a view of."""

    @staticmethod
    def __new__(cls, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Placeholder:  # noqa: D102
        return torch.Tensor._make_wrapper_subclass(cls, tuple(size), dtype=dtype, device=device)

    @property
    def whole(self) -> Any:
        """The buffer that this is, or is a view of; a cycle would keep its tensors alive."""
        return self if self.base is None else self.base

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not aten.view.default:
            raise RuntimeError(
                f"{func} of {cls.__name__}, which stands for a buffer of FSDP2's and has no data"
            )
        self, shape = args
        known = math.prod(length for length in shape if length != -1)
        view = cls(
            [length if length != -1 else self.numel() // known for length in shape], self.dtype, self.device
        )
        view.base = self.whole
        return view


class UncopiedGradients(Placeholder):
    """The buffer that gradients would be copied into, to be reduced."""

    gradients: list[Tensor]
    """Alive as long as this: until the compute stream has waited for their reduction."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is fsdp.chunk_cat.default:
            kwargs["out"].whole.gradients = list(args[0])
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


class PeerExchange:
    """Exchanges the gradients of one FSDP unit through `memory`."""

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._known: tuple[Piece, list[list[Tensor]]] | None = None

    def __call__(self, sent: UncopiedGradients) -> Tensor:
        """What all ranks have for this one's shard: (N, n), in their order; good until the next exchange."""
        memory = self._memory
        lent = memory.lend(sent.numel(), sent.dtype, sent.device)
        if self._known is None or self._known[0] is not lent.piece:
            self._known = lent.piece, self._places(sent.gradients, lent)
        lent.barrier()
        for gradient, places in zip(sent.gradients, self._known[1], strict=True):
            parts = gradient.split(_rows(gradient, memory.ranks))
            for rank in memory.others_first:
                if rank < len(parts):
                    places[rank].copy_(parts[rank], non_blocking=True)
        lent.barrier(last=True)
        return lent.of(memory.rank).view(memory.ranks, -1)

    def _places(self, gradients: Sequence[Tensor], lent: Lent) -> list[list[Tensor]]:
        """Where each rank wants its part of each gradient, in its memory; made once, for the host's sake.

        Parts are rows. Where there are not as many for every rank, nothing is said of what a shorter part
        leaves of its place: the shard has no such rows.
        """
        memory, start, found = self._memory, 0, []
        for gradient in gradients:
            rows, columns = _rows(gradient, memory.ranks), gradient.shape[1:]
            places = []
            for rank in range(memory.ranks):
                own = max(0, min(rows, len(gradient) - rank * rows))
                mine_there = lent.of(rank).view(memory.ranks, -1)[memory.rank]
                places.append(mine_there[start : start + own * columns.numel()].view(own, *columns))
            found.append(places)
            start += rows * columns.numel()
        return found


def _rows(gradient: Tensor, ranks: int) -> int:
    """Of the longest part."""
    return -(-len(gradient) // ranks)


class PendingGather(Placeholder):
    """The buffer that a unit's shards would be gathered into."""

    lent: Lent
    """This rank's shards (n,)."""
    sizes: list[int]
    """Of the shards of its weights."""
    arrived: Tensor | None = None
    """(N n,), where the weights have no place to lie in yet."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is fsdp.all_gather_copy_in.default:
            shards, output, sizes, numel, rank = args
            output.sizes = sizes
            own = output.lent.of(rank)[:numel]
            copy_shards(own.split(sizes), shards)
            return own, output
        if func is fsdp.split_with_sizes_copy.default:
            view, *sizes_and_dim = args
            if view.whole.arrived is not None:
                torch.split_with_sizes_copy(view.whole.arrived.view(view.shape), *sizes_and_dim, **kwargs)
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


class PeerAllGather(DefaultAllGather):
    """Gathers the weights of `module`, an FSDP unit, to where they stay."""

    def __init__(self, module: FSDPModule, memory: PeerMemory) -> None:
        self._memory = memory
        self._known: list[tuple[Piece, list[Tensor], list[tuple[Tensor, Tensor]]]] = []
        group = module._get_fsdp_state()._fsdp_param_group
        self._parameters = [] if group is None else group.fsdp_params
        module.set_custom_all_gather(self)
        for parameter in self._parameters:
            parameter.free_unsharded_param = _keep

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """What stands for the buffer of all shards (N n,)."""
        numel = math.prod(int(length) for length in size)
        pending = PendingGather((numel,), dtype, device)
        pending.lent = self._memory.lend(numel // self._memory.ranks, dtype, device)
        return pending

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Copy all ranks' shards to the weights' places or, the first time, to a buffer."""
        assert isinstance(output_tensor, PendingGather)
        lent = output_tensor.lent
        places, copies = self._copies(output_tensor)
        lent.barrier()
        with torch.autograd._unsafe_preserve_version_counter(tuple(places)):
            for place, shard in copies:
                place.copy_(shard, non_blocking=True)
        lent.barrier(last=True)
        return None

    def _copies(self, pending: PendingGather) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Whole weights, and pairs: the place of a shard in its weight, the shard in its owner's memory."""
        for piece, places, copies in self._known:
            if piece is pending.lent.piece:
                return places, copies
        found, sizes = self._places(pending.dtype), pending.sizes
        if found is None:
            pending.arrived = torch.empty(pending.shape, dtype=pending.dtype, device=pending.device)
            places, sizes = [pending.arrived], [sum(sizes)]
        else:
            places = found
        copies = [
            (place.narrow(0, rank * len(shard), len(shard)), shard)
            for rank in self._memory.others_first
            for place, shard in zip(places, pending.lent.of(rank).split(sizes), strict=True)
        ]
        if found is not None:  # and so they stay, in pieces that no longer change
            self._known.append((pending.lent.piece, places, copies))
        return places, copies

    def _places(self, dtype: torch.dtype) -> list[Tensor] | None:
        """Where FSDP2 wants each weight, rank by rank; None before it has made them, or if it turns them."""
        if any(parameter.fsdp_placement.dim != 0 for parameter in self._parameters):
            return None
        places = [place for parameter in self._parameters for place in parameter.all_gather_outputs]
        if not places or not all(place.untyped_storage().size() for place in places):
            return None
        return [place.view(dtype) for place in places]


def _keep() -> None:
    """In place of what frees a gathered weight."""
