"""A dry run: one process stands for all, and takes one training step without data, memory or other processes.

`comm.mode = "fake_backend"` makes every collective return at once (torch's fake process group), and
tensors carry shapes instead of values (`FakeTensorMode`). What is real is everything else: the mesh, the
converters, tensor parallelism, activation checkpointing, FSDP2, the loss, clipping and the optimizer are
those of a run, as rank 0 (or RANK) sees them. So a layout of hundreds of GPUs that does not fit together
fails here, on a laptop, with the message that it would fail with there. What each collective would move is
counted.

Not run: `torch.compile`, since there is nothing to measure; the data loader; checkpoints. The device is
the CPU.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallelisms.distributed import Rank
from parallelisms.mesh import Mesh, build_mesh
from trainer import startup
from trainer.build import build_model
from trainer.config import checks, derived
from trainer.config.device_defaults import with_device_defaults
from trainer.config.job import JobConfig
from trainer.config.load import Loaded
from trainer.data.batches import Batch
from trainer.forward import Forward
from trainer.loss import build_loss
from trainer.metrics.flops import flops_per_token
from trainer.optim.clipping import clip_grad_norm
from trainer.optim.optimizer import build_optimizer

log = logging.getLogger(__name__)

_KINDS = {
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall", "all_to_all"),
    "send": ("send",),
    "receive": ("recv",),
}
"""Kind of collective -> what its operators are called, in torch's two families of them."""


@dataclass
class Collectives:
    """What a rank's collectives would move, by (kind, ranks that take part)."""

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, int]] = field(default_factory=Counter)
    """What the rank receives: s (n - 1) / n of a whole tensor of s bytes, twice that for an all-reduce."""


@dataclass(frozen=True)
class DryRun:
    """What one step did."""

    collectives: Collectives
    parameters: int
    """Elements that this rank keeps."""


class _Counter(TorchDispatchMode):
    """Counts collectives as they pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Collectives()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = _kind(func)
        result = func(*args, **(kwargs or {}))
        if kind is not None:
            ranks = _ranks((args, kwargs))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            self.seen.calls[kind, ranks] += 1
            rounds = 2 if kind == "all_reduce" else 1
            self.seen.bytes[kind, ranks] += rounds * max(sizes) * (ranks - 1) // ranks
        return result


def _ranks(arguments: Any) -> int:
    """How many ranks take part: one family names the group, the other carries it."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf).size()
        if isinstance(leaf, str):
            with suppress(Exception):  # "sum" is a string too
                return dist.distributed_c10d._resolve_process_group(leaf).size()
    return 1


def _kind(func: Any) -> str | None:
    namespace, _, name = func._schema.name.partition("::")
    if namespace not in ("c10d", "_c10d_functional") or "wait" in name:
        return None
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), None)


def dry_run(loaded: Loaded, rank: Rank) -> DryRun:
    """Build everything and take one step, as `rank` of its world.

    Raises:
        ConfigError: as a run would.
    """
    rank = replace(rank, device=torch.device("cpu"))
    config = _eager(with_device_defaults(loaded.config, kernels=False, world_size=rank.world_size))
    _fake_process_group(rank)
    try:
        mesh = build_mesh(config.parallelism, "cpu", rank.world_size)
        log.info("dry run of %d processes as rank %d", rank.world_size, rank.rank)
        for line in checks.warnings(loaded):
            log.warning("%s", line)
        log.info("mesh: %s", mesh.describe())
        batch = derived.batch_arithmetic(config, rank.world_size)
        startup.announce_data(config, batch)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        built = build_model(config, mesh, rank.device, seed=0, fake=fake)
        startup.announce_model(config, built, flops_per_token(built.flop_inputs, config.training.seq_len))
        with fake:
            forward = Forward(config, built, mesh, rank.device, build_loss(config.training, config.compile))
            optimizer = build_optimizer(built.model, replace(config.optimizer, implementation="foreach"))
            if built.direct is not None:
                built.direct.attach(optimizer)
            with _Counter() as counter:
                _step(config, forward, built.model, optimizer, mesh, batch)
        kept = sum(
            p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in built.model.parameters()
        )
    finally:
        dist.destroy_process_group()
    found = DryRun(counter.seen, kept)
    _report(found, rank)
    return found


def _eager(config: JobConfig) -> JobConfig:
    recompute = config.activation_checkpoint
    if recompute.mode == "memory_budget":  # the compiler's work
        recompute = replace(recompute, mode="none")
    return replace(
        config,
        compile=replace(config.compile, enable=False),
        activation_checkpoint=recompute,
        # The first is the compiler's too, the second GPUs'.
        parallelism=replace(config.parallelism, enable_async_tensor_parallel=False, fsdp_transport="nccl"),
    )


def _fake_process_group(rank: Rank) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank.rank, world_size=rank.world_size)


def _step(
    config: JobConfig,
    forward: Forward,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    batch: derived.BatchArithmetic,
) -> None:
    """One optimizer step over all micro-batches, as `Trainer.train_step` takes it."""
    shape = (batch.local_batch_size, batch.seq_len)
    for index in range(1, batch.gradient_accumulation_steps + 1):
        tokens, labels, documents = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        valid = torch.tensor(float(batch.tokens_per_step))
        last = index == batch.gradient_accumulation_steps
        forward.forward_backward(Batch(tokens, labels, documents, batch.seq_len), valid, last=last)
    clip_grad_norm(model.parameters(), config.training.max_norm, mesh.stage_group)
    optimizer.step()
    optimizer.zero_grad()


def _report(found: DryRun, rank: Rank) -> None:
    log.info(
        "dry run: rank %d of %d took one step without the others; it keeps %s parameters",
        rank.rank,
        rank.world_size,
        f"{found.parameters:,}",
    )
    for (kind, ranks), calls in sorted(found.collectives.calls.items()):
        received = found.collectives.bytes[kind, ranks] / 1e9
        log.info("  %-14s over %4d ranks  %6d calls  %12.6f GB received", kind, ranks, calls, received)
