"""FSDP2's collectives as copies between the GPUs of a host, made by their copy engines.

NCCL moves data with a kernel that holds multiprocessors for as long as a collective takes, and the GEMMs
beside it have so many fewer. Where GPUs can read each other's memory a copy engine can move it:

    gather     barrier; each rank copies every other rank's shard out of that rank's buffer; barrier
    reduce     barrier; each rank copies its chunk out of every rank's buffer; barrier; sum of what came

The first barrier: what is to be read is there. The second: it has been read, so its owner may write there
again. A barrier is one block of a kernel for microseconds; the sum is `parallelisms.fsdp_comm`'s.

Buffers are symmetric memory (`torch.distributed._symmetric_memory`): as large on every rank, made together,
once, and lent in turn. Two of a size are enough: FSDP2 lets a gather begin when the last but one has been
copied out, and a reduction when the last has ended.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# `FSDPModule.set_custom_all_gather` is public, what it takes has no public home yet (torch 2.13).
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather


class _Buffer(NamedTuple):
    memory: Tensor
    """(bytes,) uint8."""
    handle: Any
    """What knows the other ranks' buffers."""


class PeerBuffers:
    """Memory of this rank that the other ranks of a group can read.

    Every rank must ask for the same sizes in the same order, as FSDP2 does.
    """

    IN_TURN = 2

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self._group = group
        self._rings: dict[int, list[_Buffer]] = defaultdict(list)
        self._lent: dict[int, int] = defaultdict(int)

    def lend(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor (numel,) in such memory, good until as many more of its size are lent."""
        size = numel * dtype.itemsize
        ring, turn = self._rings[size], self._lent[size] % self.IN_TURN
        if len(ring) < self.IN_TURN:
            ring.append(self._new(size, device))
        self._lent[size] += 1
        return ring[turn].memory.view(dtype)

    def barrier(self, lent: Tensor) -> None:
        """On the current stream: wait until every rank has come here with its own of these buffers."""
        self._of(lent).handle.barrier()

    def read(self, lent: Tensor, rank: int, start: int, out: Tensor) -> None:
        """Copy ``[start : start + len(out)]`` of `rank`'s counterpart of `lent` to `out`, contiguous."""
        size, dtype = out.dtype.itemsize, torch.uint8
        source = self._of(lent).handle.get_buffer(rank, (out.numel() * size,), dtype, start * size)
        out.view(dtype).copy_(source, non_blocking=True)

    def _new(self, size: int, device: torch.device) -> _Buffer:
        from torch.distributed._symmetric_memory import empty, rendezvous

        memory = empty(size, dtype=torch.uint8, device=device)
        # Its zeros, signals among them, are written behind all that the compute stream has yet to do: later,
        # without this, than another rank's first signal, which would be lost and waited for forever.
        torch.cuda.synchronize(device)
        return _Buffer(memory, rendezvous(memory, self._group.group_name))

    def _of(self, lent: Tensor) -> _Buffer:
        place = lent.untyped_storage().data_ptr()
        buffers = (b for ring in self._rings.values() for b in ring)
        return next(b for b in buffers if b.memory.untyped_storage().data_ptr() == place)


class PeerAllGather(DefaultAllGather):
    """FSDP2's all-gather out of peers' buffers; FSDP2 has put this rank's shard in its place already."""

    def __init__(self, buffers: PeerBuffers) -> None:
        self._buffers = buffers

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The buffer for all shards (N n,)."""
        return self._buffers.lend(math.prod(int(length) for length in size), dtype, device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Fill `output_tensor` (N n,), of which `input_tensor` (n,) is this rank's part."""
        buffers, length = self._buffers, input_tensor.numel()
        buffers.barrier(output_tensor)
        for step in range(1, buffers.ranks):  # each rank begins with another one
            other = (buffers.rank + step) % buffers.ranks
            start = other * length
            buffers.read(output_tensor, other, start, output_tensor.narrow(0, start, length))
        buffers.barrier(output_tensor)
        return None


def check_peers(mesh: DeviceMesh) -> None:
    """Raise ValueError where the shards of `mesh` (its last axis) are not on CUDA GPUs of one host."""
    if mesh.device_type != "cuda":
        raise ValueError("copies between GPUs need CUDA GPUs")
    ranks = dist.get_process_group_ranks(mesh.get_group(mesh.ndim - 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if len({rank // local for rank in ranks}) > 1:
        raise ValueError(f"copies between GPUs need all shards on one host; ranks {ranks} are on several")
