"""Degrees, batch and pipeline stages of a run of `world_size` processes. Torch-free.

Ranks are numbered with the last axis running fastest (``pp dp_replicate dp_shard cp tp``), so the group of an
axis spans stride x degree ranks, where the stride is the product of the degrees behind it. A group that spans
more than a host talks over the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from models import MODELS
from parallelisms.pipeline_schedules import SCHEDULES, Schedule
from trainer.config.derived import BatchArithmetic, batch_arithmetic, dp_shard_degree
from trainer.config.pipeline_checks import stages_of

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    world_size: int
    degrees: dict[str, int]
    batch: BatchArithmetic
    stage_microbatches: int
    """Micro-batches that go through the pipeline in one forward-backward; 1 without one."""
    devices_per_host: int
    layer_group: None = None
    """A planned mesh has no process groups."""
    stage_group: None = None
    """The same."""

    @property
    def fsdp_degree(self) -> int:
        """Ranks that a parameter is sharded over: the context-parallel ones hold parts of it too."""
        return self.degrees["dp_shard"] * self.degrees["cp"]

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.degrees["tp"]

    @property
    def rounds(self) -> int:
        """Forwards and backwards of a rank in one step."""
        return self.stage_microbatches * self.batch.gradient_accumulation_steps

    @property
    def sequences(self) -> int:
        """Sequences that one forward sees: the local batch, or a pipeline's micro-batch of it."""
        return self.batch.local_batch_size // self.stage_microbatches

    @property
    def tokens(self) -> int:
        """Positions that one forward of a rank works on (all of its tensor-parallel group together)."""
        return self.sequences * self.batch.seq_len // self.degrees["cp"]

    def span(self, *axes: str) -> int:
        """Neighbouring ranks that a group over `axes` (side by side in the mesh) reaches across."""
        last = max(AXES.index(axis) for axis in axes)
        return prod(self.degrees[axis] for axis in (*axes, *AXES[last + 1 :]))

    def within_host(self, *axes: str) -> bool:
        """True where a group over `axes` stays inside one host."""
        return self.span(*axes) <= self.devices_per_host

    def describe(self) -> str:
        """One line: ``dp_shard 64 x tp 8``."""
        shown = [f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " x ".join(shown) or "one device"


def build_layout(config: Any, world_size: int, devices_per_host: int = 8) -> Layout:
    """The layout of a checked configuration."""
    p = config.parallelism
    degrees = {
        "pp": p.pipeline_parallel_degree,
        "dp_replicate": p.data_parallel_replicate_degree,
        "dp_shard": dp_shard_degree(config, world_size),
        "cp": p.context_parallel_degree,
        "tp": p.tensor_parallel_degree,
    }
    microbatches = 1
    if degrees["pp"] > 1:
        microbatches = max(1, config.training.local_batch_size // p.pipeline_parallel_microbatch_size)
    return Layout(world_size, degrees, batch_arithmetic(config, world_size), microbatches, devices_per_host)


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds, and how many forwards it keeps the activations of."""

    rank: int
    layers: tuple[int, ...]
    first: bool
    last: bool
    in_flight: int


def build_stages(config: Any, layout: Layout, n_layers: int) -> list[Stage]:
    """What every pipeline rank holds, all of its stages together; all is on one without a pipeline."""
    blocks = MODELS[config.model.name].blocks
    cut = stages_of(config, n_layers)
    found = []
    for rank in range(layout.degrees["pp"]):
        held = cut.of_rank(rank)
        names = [name for stage in held for name in cut.fqns[stage]]
        layers = [int(name.rpartition(".")[2]) for name in names if name.startswith(f"{blocks}.")]
        flying = _in_flight(config.parallelism.pipeline_parallel_schedule, layout, rank, len(held))
        found.append(Stage(rank, tuple(layers), 0 in held, cut.count - 1 in held, flying))
    return found


def _in_flight(schedule: str, layout: Layout, rank: int, stages: int) -> int:
    """Micro-batches whose activations (of all stages of the rank) are kept at once, at the most.

    GPipe and its looped form keep all; 1F1B those on their way between the rank and the end; with several
    stages a rank, as many forwards of one stage as Interleaved 1F1B runs before its first backward (Narayanan
    et al. 2021, arXiv 2104.04473, section 2.2); V-shaped schedules as many as there are ranks.
    """
    ranks, all_of_them = layout.degrees["pp"], layout.stage_microbatches
    if schedule in ("GPipe", "LoopedBFS"):
        return all_of_them
    if SCHEDULES.get(schedule, Schedule()).v_shaped:
        return min(all_of_them, ranks)
    if stages > 1:
        forwards = 2 * (ranks - rank - 1) + (stages - 1) * ranks + 1
        return min(all_of_them, -(-forwards // stages))
    return min(all_of_them, ranks - rank)
