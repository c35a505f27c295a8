"""The summary at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.metrics.meter import CHECKPOINT, COMPILE, DATA_LOADING, TRAINING, VALIDATION, Throughput
from trainer.metrics.step_line import format_seconds

# What the summary calls a phase, in the order it lists them.
_PHASES = {
    TRAINING: "training",
    DATA_LOADING: "data",
    COMPILE: "compile",
    VALIDATION: "validation",
    CHECKPOINT: "checkpoint",
}


@dataclass(frozen=True)
class RunSummary:
    """What a process of a run did from its first step on."""

    last_step: int
    steps: int
    """Steps of this process; fewer than `last_step` where it resumed."""
    tokens: int
    """Tokens that the model has seen, over all devices and former processes."""
    final_loss: float | None
    final_loss_step: int
    validation_loss: float | None
    """Of the last validation."""
    throughput: Throughput | None
    """Mean after warm-up."""
    peak_memory_gib: float
    peak_memory_percent: float
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def wall_seconds(self) -> float:
        """From the first step's begin to now."""
        return sum(self.phase_seconds.values())


def summary_lines(summary: RunSummary) -> list[str]:
    """The summary as aligned lines of text; none of them reads like a step line."""
    rows = [("steps", _steps(summary)), ("tokens seen", f"{summary.tokens:,}")]
    if summary.final_loss is not None:
        rows.append(("final loss", f"{summary.final_loss:.5f} at {summary.final_loss_step}"))
    if summary.validation_loss is not None:
        rows.append(("validation loss", f"{summary.validation_loss:.5f}"))
    rows.append(("mean throughput", _throughput(summary.throughput)))
    rows.append(("peak memory", f"{summary.peak_memory_gib:.2f}GiB ({summary.peak_memory_percent:.2f}%)"))
    rows.append(("time", _times(summary)))
    width = max(len(name) for name, _ in rows)
    return ["summary", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def _steps(summary: RunSummary) -> str:
    if summary.steps == summary.last_step:
        return f"{summary.last_step:,}"
    return f"{summary.last_step:,}, of which {summary.steps:,} since this process started"


def _throughput(throughput: Throughput | None) -> str:
    if throughput is None:
        return "n/a (no step after the first line, which is warm-up)"
    mfu = "n/a" if throughput.mfu is None else f"{throughput.mfu:.2f}%"
    return (
        f"{round(throughput.tps):,} tokens/s per device after warm-up "
        f"({throughput.steps:,} steps, {throughput.tflops:,.2f} TFLOP/s, mfu {mfu})"
    )


def _times(summary: RunSummary) -> str:
    seconds = summary.phase_seconds
    names = [*_PHASES, *(name for name in seconds if name not in _PHASES)]
    # Phases that did not occur are left out, except those that a reader looks for.
    shown = [name for name in names if name in (TRAINING, DATA_LOADING) or seconds.get(name, 0.0) > 0]
    parts = [f"{_PHASES.get(name, name)} {format_seconds(seconds.get(name, 0.0))}" for name in shown]
    return f"{format_seconds(summary.wall_seconds)} = {' + '.join(parts)}"
