"""`activation_checkpoint.mode = "auto"`: the least recompute that fits the device.

Candidates are keeping everything, recomputing every n-th block, the per-op choice and recomputing every
block. Each is priced in seconds of recompute (`step_time`) and in peak memory (`memory`); the cheapest
that fits is taken. It follows from the configuration, the mesh and the device's memory alone, so all ranks
choose alike. On a CPU nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallelisms.config import ActivationCheckpointConfig
from trainer.metrics.devices import Device
from trainer.plan.activations import Recompute
from trainer.plan.layout import Layout, Stage
from trainer.plan.memory import GIB, MemoryPlan
from trainer.plan.memory_shape import plan_memory
from trainer.plan.shapes import ModelShape
from trainer.plan.step_time import recompute_seconds

USABLE_SHARE = 0.92
"""Of the device's memory: the rest is for the CUDA context, NCCL's buffers and the allocator's gaps."""
_EVERY = (8, 4, 3, 2)


@dataclass(frozen=True)
class Option:
    """One way to recompute, and what it costs."""

    recompute: Recompute
    worst: MemoryPlan
    """Of the pipeline rank that needs most."""
    recompute_seconds: float
    """Of one forward and backward, on the pipeline rank that recomputes most."""

    def fits(self, memory_bytes: float) -> bool:
        """True where a device of that memory can run it."""
        return self.worst.reserved_bytes <= USABLE_SHARE * memory_bytes


def requested(config: ActivationCheckpointConfig) -> Recompute:
    """The setting as `activations` takes it; ``auto`` must have been resolved."""
    per_op = config.mode == "selective" and config.selective_ac_option == "op"
    every = int(config.selective_ac_option) if config.mode == "selective" and not per_op else 1
    return Recompute(config.mode, every, per_op, config.memory_budget)


def options(
    config: Any, model: ModelShape, layout: Layout, stages: Sequence[Stage], device: Device
) -> list[Option]:
    """All candidates, the cheapest first."""
    every = [Recompute("selective", n) for n in _EVERY if n <= model.n_layers]
    candidates = [Recompute("none"), *every, Recompute("selective", per_op=True), Recompute("full")]
    found = [price(config, model, layout, stages, device, candidate) for candidate in candidates]
    return sorted(found, key=lambda option: (option.recompute_seconds, option.worst.reserved_bytes))


def price(
    config: Any,
    model: ModelShape,
    layout: Layout,
    stages: Sequence[Stage],
    device: Device,
    recompute: Recompute,
) -> Option:
    """What one setting costs."""
    plans = plan_memory(config, model, layout, stages, recompute)
    seconds = max(
        sum(recompute_seconds(model, layout, recompute, layer, device) for layer in stage.layers)
        for stage in stages
    )
    return Option(recompute, max(plans, key=lambda plan: plan.reserved_bytes), seconds)


def choose(found: Sequence[Option], memory_bytes: float) -> Option:
    """The cheapest that fits, or the smallest where none does."""
    fitting = [option for option in found if option.fits(memory_bytes)]
    return fitting[0] if fitting else min(found, key=lambda option: option.worst.reserved_bytes)


def as_config(config: ActivationCheckpointConfig, recompute: Recompute) -> ActivationCheckpointConfig:
    """The section with ``auto`` replaced by what was chosen."""
    if recompute.mode != "selective":
        return replace(config, mode=recompute.mode)  # type: ignore[arg-type]
    option = "op" if recompute.per_op else str(recompute.every)
    return replace(config, mode="selective", selective_ac_option=option)


def describe(option: Option, memory_bytes: float) -> str:
    """One line for the start-up log and the plan."""
    need, have = option.worst.reserved_bytes / GIB, memory_bytes / GIB
    text = f"auto chose {option.recompute.describe()}: plans {need:.1f} of {have:.1f} GiB"
    if not option.fits(memory_bytes):
        text += f", more than the {100 * USABLE_SHARE:.0f} % that are usable: it may run out of memory"
    return text
