"""Memory of this GPU that the other GPUs of the host can read and write: what copies between them need.

NCCL moves data with a kernel that holds multiprocessors for as long as a collective takes, and the GEMMs
beside it have so many fewer. Where GPUs reach each other's memory a copy engine can move it (a plain
device-to-device copy), and no multiprocessor is held. What is left of a collective are two barriers, one
block of a kernel each:

    lend       this rank's piece of memory; the stream waits until nobody uses what it held before
    barrier    of all ranks: what is to be read is there, or what is to be written may be
    copies     to or from the other ranks' pieces
    barrier    all copies have been made

A piece is symmetric memory (`torch.distributed._symmetric_memory`): as large on every rank, and made by all
together. So every rank must ask for the same sizes in the same order, as FSDP2 does. Pieces are lent in turn,
and one that is too small is replaced: a run makes them in its first step.

They lie outside the CUDA allocator's pools, so its statistics do not show them; `bytes_held` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_GRAIN = 16 * 2**20
"""Sizes are rounded up to it, so that nearly equal ones share a piece."""
_held = 0


def piece_bytes(size: int) -> int:
    """What a piece that holds `size` bytes takes."""
    return -(-size // _GRAIN) * _GRAIN


def bytes_held() -> int:
    """Bytes of this process in such memory."""
    return _held


@dataclass
class Piece:
    """A piece of memory of the same size on every rank."""

    peers: Sequence[Tensor]
    """(bytes,) uint8: every rank's, as this one sees them."""
    meet: Callable[[], None]
    """Wait, on the current stream, until every rank has come here."""
    done: torch.Event | None = None
    """When all ranks were done with what it held."""


@dataclass
class Lent:
    """What a piece is used for at present: a tensor (numel,) on every rank."""

    piece: Piece
    numel: int
    dtype: torch.dtype

    def of(self, rank: int) -> Tensor:
        """The tensor of `rank`."""
        return self.piece.peers[rank][: self.numel * self.dtype.itemsize].view(self.dtype)

    def barrier(self, *, last: bool = False) -> None:
        """On the current stream: wait for all ranks. The `last` one ends the use of the tensor."""
        self.piece.meet()
        if last and self.piece.peers[0].is_cuda:
            self.piece.done = torch.cuda.current_stream().record_event()


class PeerMemory:
    """Pieces that the ranks of `group`, on GPUs of one host, lend themselves in turn."""

    def __init__(self, group: dist.ProcessGroup, pieces: int = 1) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self.others_first = [(self.rank + step) % self.ranks for step in range(1, self.ranks + 1)]
        """All ranks. Each begins with another one, so that no link is busier than the rest."""
        self._group = group
        self._pieces: list[Piece | None] = [None] * pieces
        self._turn = 0

    def lend(self, numel: int, dtype: torch.dtype, device: torch.device) -> Lent:
        """A tensor that the current stream may write to (this rank's), good for as many turns as pieces."""
        turn, size = self._turn, numel * dtype.itemsize
        self._turn = (turn + 1) % len(self._pieces)
        piece = self._pieces[turn]
        if piece is None or len(piece.peers[0]) < size:
            piece = self._replaced(turn, piece_bytes(size), device)
        elif piece.done is not None:
            torch.cuda.current_stream(device).wait_event(piece.done)
        return Lent(piece, numel, dtype)

    def _replaced(self, turn: int, size: int, device: torch.device) -> Piece:
        global _held
        if (former := self._pieces[turn]) is not None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # barriers read a table that goes with it
            _held -= len(former.peers[0])
        self._pieces[turn] = former = None
        self._pieces[turn] = piece = self._make(size, device)
        _held += size
        return piece

    def _make(self, size: int, device: torch.device) -> Piece:
        from torch.distributed._symmetric_memory import empty, rendezvous

        memory = empty(size, dtype=torch.uint8, device=device)
        # Its zeros, signals among them, are written behind all that the compute stream has yet to do: later,
        # without this, than another rank's first signal, which would be lost and waited for forever.
        torch.cuda.synchronize(device)
        handle = rendezvous(memory, self._group.group_name)
        # The table of all ranks' addresses is copied to the GPU on another stream than barriers read it on.
        torch.cuda.synchronize(device)
        peers = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self.ranks)]
        peers[self.rank] = memory  # which keeps it alive
        return Piece(peers, handle.barrier)


def reach_each_other(device: torch.device, world_size: int) -> bool:
    """Whether all processes are on this host, with a GPU each that can use the memory of all others."""
    if device.type != "cuda" or _processes_here(world_size) != world_size:
        return False
    if torch.cuda.device_count() < world_size:  # each process sees its own alone
        return False
    gpus = range(world_size)
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


def check_peers(mesh: DeviceMesh) -> None:
    """Raise ValueError where the shards of `mesh` (its last axis) are not on CUDA GPUs of one host."""
    if mesh.device_type != "cuda":
        raise ValueError("copies between GPUs need CUDA GPUs")
    ranks = dist.get_process_group_ranks(mesh.get_group(mesh.ndim - 1))
    local = _processes_here(dist.get_world_size())
    if len({rank // local for rank in ranks}) > 1:
        raise ValueError(f"copies between GPUs need all shards on one host; ranks {ranks} are on several")


def _processes_here(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
