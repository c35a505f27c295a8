"""Process group, device, determinism: what a rank sets up before a model exists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallelisms.config import CommConfig

ATTEMPT_VARIABLE = "OCTAVO_ATTEMPT"
"""Environment variable with a name that is new for each start of the workers, and the same for them all."""


@dataclass(frozen=True)
class Rank:
    """Who this process is. One process without torchrun is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_env(cls) -> Rank:
        """Read torchrun's variables and choose the device: this rank's GPU, else the CPU."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        return cls(int(os.environ.get("RANK", 0)), local_rank, int(os.environ.get("WORLD_SIZE", 1)), device)


def init_process_group(
    rank: Rank, config: CommConfig, run_folder: Path, *, cpu_collectives: bool = False
) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs, both where `cpu_collectives` (CPU offload).

    The flight recorder is on: when a rank hangs, each rank knows its last collectives. NCCL writes them below
    `run_folder` by itself when a collective times out.
    """
    if config.trace_buf_size > 0:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(config.trace_buf_size))
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
        backend = "cuda:nccl,cpu:gloo" if cpu_collectives else "nccl"
        if config.trace_buf_size > 0:
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            traces = run_folder / config.save_traces_folder
            with suppress(OSError):  # a folder that cannot be written is reported with the run folder
                traces.mkdir(parents=True, exist_ok=True)
            for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # new and old name
                os.environ.setdefault(name, str(traces / config.save_traces_file_prefix))
    else:
        backend = "gloo"
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("RANK", str(rank.rank))
    os.environ.setdefault("WORLD_SIZE", str(rank.world_size))
    store = _store_of_attempt()
    dist.init_process_group(
        backend,
        store=store,
        rank=rank.rank if store is not None else -1,
        world_size=rank.world_size if store is not None else -1,
        timeout=timedelta(seconds=config.init_timeout_seconds),
        device_id=rank.device if rank.device.type == "cuda" and not cpu_collectives else None,
    )


def _store_of_attempt() -> dist.Store | None:
    """The launcher's store, under the name of this attempt; None without a launcher.

    torchrun keeps one store over its restarts (2.13: `DynamicRendezvousHandler.next_rendezvous`), and gloo
    would find the addresses of workers that are dead.
    """
    attempt = os.environ.get(ATTEMPT_VARIABLE)
    if attempt is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(attempt, dist.TCPStore(host, port, is_master=False))


def set_collective_timeout(groups: Iterable[dist.ProcessGroup], seconds: int) -> None:
    """Give every one of `groups` (and the world) another timeout.

    Step 1 waits for compilation and first allocations; afterwards a collective that takes long is a hang,
    so the trainer shortens the timeout once step 1 is over.
    """
    timeout = timedelta(seconds=seconds)
    on_gpus = dist.get_backend() != "gloo"
    dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)
    for group in [*groups, None]:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def is_lost_connection(error: BaseException) -> bool:
    """Whether `error` is a collective's: that another rank is gone or silent, not what happened to it."""
    if isinstance(error, dist.DistError):  # NCCL, stores, sockets
        return True
    gloo = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")  # a plain RuntimeError
    return isinstance(error, RuntimeError) and any(part in str(error) for part in gloo)


def set_deterministic(warn_only: bool) -> None:
    """Allow deterministic algorithms only; equal runs then give equal bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int) -> None:
    """Begin a step with generators that follow from (seed, step) alone, the same on every rank.

    What was drawn before, by a compiler that tries kernels out, say, then changes nothing: a run that is
    resumed at a step draws what the unbroken one does, and no generator has to be saved.
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def shared_seed(seed: int | None, device: torch.device) -> int:
    """`seed`, or one drawn by rank 0 that every rank then has."""
    if seed is not None:
        return seed
    drawn = torch.randint(2**31, (1,), dtype=torch.int64).to(device)
    if dist.get_world_size() > 1:
        dist.broadcast(drawn, src=0)
    return int(drawn)
