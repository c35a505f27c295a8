"""Degrees, batch and pipeline stages of a run of `world_size` processes. Torch-free.

Ranks are numbered with the last axis running fastest (``pp dp_replicate dp_shard cp tp``), so the group of an
axis spans stride x degree ranks, where the stride is the product of the degrees behind it. A group that spans
more than a host talks over the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from trainer.config.checks import BatchArithmetic, batch_arithmetic, dp_shard_degree

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
    """The model's blocks over the pipeline's ranks, as evenly as they go; one stage without a pipeline.

    Under GPipe a rank keeps the activations of every micro-batch; under the others of those that are on their
    way between it and the end (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    degree = layout.degrees["pp"]
    share, extra = divmod(n_layers, degree)
    stages, start = [], 0
    for rank in range(degree):
        count = share + (rank < extra)
        flying = layout.stage_microbatches
        if config.parallelism.pipeline_parallel_schedule != "GPipe":
            flying = min(flying, degree - rank)
        layers = tuple(range(start, start + count))
        stages.append(Stage(rank, layers, rank == 0, rank == degree - 1, flying))
        start += count
    return stages
