"""What the trainer drives: one object that counts, prints and records.

In a training loop::

    metrics = MetricsLogger(config.metrics, run_folder, ...)
    metrics.start()
    for step in ...:
        with metrics.data_loading():
            batch = next(batches)
        ...                                             # forward, backward, optimizer
        metrics.settle()                                # with this step queued: the line of the last
        metrics.count_step(tokens_of_this_dp_rank)
        if metrics.should_log(step):
            metrics.log_step(step, loss=..., ...)       # or log_arrival, which waits for nothing
        with metrics.excluded("validation"):
            ...
        metrics.log_validation(step, loss)
    metrics.finish(step, tokens_seen=...)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.metrics.config import MetricsConfig
from trainer.metrics.devices import peak_tflops
from trainer.metrics.memory import MemoryMonitor, MemoryReading
from trainer.metrics.meter import CHECKPOINT, COMPILE, VALIDATION, Throughput, ThroughputMeter, Window
from trainer.metrics.sinks import build_sinks
from trainer.metrics.step_line import Progress, format_step_line, format_validation_line, use_colors
from trainer.metrics.summary import RunSummary, summary_lines

if TYPE_CHECKING:
    import torch

    from trainer.arrival import Arrival

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Unlogged:
    """A step whose numbers are on their way; what the host knew when it launched the step."""

    step: int
    numbers: Arrival
    lr: float
    tokens_seen: int
    window: Window
    memory: MemoryReading


class MetricsLogger:
    """Counts tokens, time and memory; prints the step line; writes the scalars.

    Every rank has one and prints its own tps and memory (the launcher chooses whose output is shown); the
    losses that it is given are global. Only the metrics rank writes files.

    Args:
        config: The ``[metrics]`` section.
        run_folder: Root of the run's outputs, `job.dump_folder`.
        flops_per_token: F of `trainer.metrics.flops`.
        device: The device that this rank trains on.
        total_steps: Steps of the whole run, `training.steps`.
        non_data_parallel_degree: cp * tp * pp.
        rank: Global rank.
        is_metrics_rank: Whether this rank writes ``metrics.jsonl``.
        resume_step: The step that the run resumes after, or None for a fresh start.
        watch_compile: Whether anything is compiled; imports torch._dynamo.
        run_config: The run's configuration, for W&B.
        emit: Takes each line; by default a logger at level INFO.
        clock: Seconds from any origin; a test passes its own.

    Raises:
        ValueError: A sink was asked for whose package is not installed.
    """

    def __init__(
        self,
        config: MetricsConfig,
        run_folder: Path,
        *,
        flops_per_token: int,
        device: torch.device | str,
        total_steps: int,
        non_data_parallel_degree: int = 1,
        rank: int = 0,
        is_metrics_rank: bool = True,
        resume_step: int | None = None,
        watch_compile: bool = False,
        run_config: Mapping[str, Any] | None = None,
        emit: Callable[[str], None] = _log.info,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._emit = emit
        self._color = use_colors(sys.stdout, disabled=config.disable_color_printing)
        self.memory = MemoryMonitor(device)
        self.device_name, synchronize = _device_name_and_synchronize(self.memory.device)
        self.peak_tflops = config.peak_tflops or peak_tflops(self.device_name)
        if self.peak_tflops is None and self.memory.device.type == "cuda":
            _log.warning(
                "no bf16 peak is known for %s: mfu is n/a unless metrics.peak_tflops is set", self.device_name
            )
        self.meter = ThroughputMeter(
            flops_per_token=flops_per_token,
            peak_tflops=self.peak_tflops,
            non_data_parallel_degree=non_data_parallel_degree,
            clock=clock,
            synchronize=synchronize,
        )
        if watch_compile:
            self.meter.watch_compile()
        self._progress = Progress(total_steps, clock=clock)
        self._sinks = build_sinks(
            config,
            run_folder,
            rank=rank,
            is_metrics_rank=is_metrics_rank,
            resume_step=resume_step,
            run_config=run_config,
        )
        self._unlogged: _Unlogged | None = None
        self._peak_memory = (0.0, 0.0)
        self._final_loss: tuple[int, float] | None = None
        self._validation_loss: float | None = None
        self._validation_seconds = 0.0

    def start(self) -> None:
        """Begin to count: call it right before the first step."""
        self.meter.start()
        self.memory.reset()
        self._validation_seconds = 0.0

    def data_loading(self) -> AbstractContextManager[None]:
        """Around the wait for a batch."""
        return self.meter.data_loading()

    def excluded(self, name: str) -> AbstractContextManager[None]:
        """Around work that is not training, outside tps: "validation", "checkpoint", "profiling", ..."""
        self.settle()
        return self.meter.excluded(name)

    def count_step(self, tokens: int) -> None:
        """Count an optimizer step that trained `tokens` tokens on this data-parallel rank."""
        self.meter.count_step(tokens)

    def should_log(self, step: int) -> bool:
        """Whether `step`, from 1, has a step line."""
        return step == 1 or step % self._config.log_freq == 0

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        max_loss: float,
        grad_norm: float,
        lr: float,
        tokens_seen: int,
    ) -> None:
        """Print the step line and write its scalars.

        Args:
            step: Step of the optimizer, from 1.
            loss: Global mean over valid tokens.
            max_loss: The largest among the ranks' own means.
            grad_norm: Before clipping.
            lr: The learning rate of this step.
            tokens_seen: Tokens that the model has seen, over all devices and since the run's very start.
        """
        rates, memory = self.meter.read(), self.memory.read()
        numbers = {"loss": loss, "max_loss": max_loss, "grad_norm": grad_norm, "lr": lr}
        self._log(step, rates, memory, numbers, tokens_seen)

    def log_arrival(self, step: int, numbers: Arrival, *, lr: float, tokens_seen: int) -> None:
        """`log_step` of a step that the device may still be busy with: the line follows with `settle`.

        The first line is waited for, so that it is there before a second step compiles anything.

        Args:
            step: Step of the optimizer, from 1.
            numbers: (3,): `loss`, `max_loss` and `grad_norm` as for `log_step`.
            lr: The learning rate of this step.
            tokens_seen: As for `log_step`.
        """
        self.settle()
        is_first = self.meter.is_warming_up
        window, memory = self.meter.close_window(), self.memory.read()
        self._unlogged = _Unlogged(step, numbers, lr, tokens_seen, window, memory)
        if is_first or numbers.is_here:
            self.settle()

    def settle(self) -> None:
        """Log what `log_arrival` left: when the next step's work is queued, or nothing follows."""
        left, self._unlogged = self._unlogged, None
        if left is not None:
            names = ("loss", "max_loss", "grad_norm")
            numbers = dict(zip(names, left.numbers.wait().tolist(), strict=True), lr=left.lr)
            rates = self.meter.read(left.window, left.numbers.seconds_ago())
            self._log(left.step, rates, left.memory, numbers, left.tokens_seen)

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars of their own, on a step that may have no step line."""
        if scalars:
            self._write(step, scalars)

    def log_validation(self, step: int, loss: float) -> None:
        """Print and write the loss of a validation that ran inside ``excluded("validation")``."""
        total = self.meter.phases.seconds().get(VALIDATION, 0.0)
        seconds, self._validation_seconds = total - self._validation_seconds, total
        self._validation_loss = loss
        self._emit(format_validation_line(step=step, loss=loss, seconds=seconds, color=self._color))
        self._write(step, {"validation_loss": loss})

    def summary(self, step: int, *, tokens_seen: int) -> RunSummary:
        """What this process did up to `step`."""
        self.settle()
        throughput = self.meter.mean_after_warmup()
        memory = self.memory.read()
        self._note_memory(memory.reserved_gib, memory.reserved_percent)
        loss_step, loss = self._final_loss or (0, None)
        return RunSummary(
            last_step=step,
            steps=self.meter.total_steps,
            tokens=tokens_seen,
            final_loss=loss,
            final_loss_step=loss_step,
            validation_loss=self._validation_loss,
            throughput=throughput,
            peak_memory_gib=self._peak_memory[0],
            peak_memory_percent=self._peak_memory[1],
            phase_seconds=self.meter.phases.seconds(),
        )

    def finish(self, step: int, *, tokens_seen: int) -> RunSummary:
        """Print the summary after the last step and close the sinks."""
        summary = self.summary(step, tokens_seen=tokens_seen)
        for line in summary_lines(summary):
            self._emit(line)
        self.close()
        return summary

    def close(self) -> None:
        """Close the sinks; on the way out of a failed run. A second call does nothing."""
        with suppress(RuntimeError):  # a device that failed has no numbers to give, and may hang
            if self._unlogged is not None and self._unlogged.numbers.is_here:
                self.settle()
        self.meter.stop()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()

    def _log(
        self,
        step: int,
        rates: Throughput,
        memory: MemoryReading,
        numbers: Mapping[str, float],
        tokens_seen: int,
    ) -> None:
        self._final_loss = (step, numbers["loss"])
        self._note_memory(memory.reserved_gib, memory.reserved_percent)
        self._emit(
            format_step_line(
                step=step,
                loss=numbers["loss"],
                grad_norm=numbers["grad_norm"],
                memory_gib=memory.reserved_gib,
                memory_percent=memory.reserved_percent,
                tps=rates.tps,
                tflops=rates.tflops,
                mfu=rates.mfu,
                color=self._color,
            )
        )
        if hint := self._progress.hint(step, color=self._color):
            self._emit(hint)
        outside = rates.phase_seconds
        self._write(
            step,
            {
                **numbers,
                "tps": round(rates.tps, 2),
                "tflops": round(rates.tflops, 4),
                "mfu": None if rates.mfu is None else round(rates.mfu, 4),
                "memory_gib": round(memory.reserved_gib, 4),
                "memory_percent": round(memory.reserved_percent, 4),
                "memory_active_gib": round(memory.active_gib, 4),
                "memory_active_percent": round(memory.active_percent, 4),
                "memory_alloc_retries": memory.alloc_retries,
                "memory_ooms": memory.ooms,
                "tokens": tokens_seen,
                "time_end_to_end": round(rates.end_to_end_seconds_per_step, 6),
                "time_data_loading": round(rates.data_loading_seconds_per_step, 6),
                "time_data_loading_percent": round(rates.data_loading_percent, 4),
                "time_compile": round(outside.get(COMPILE, 0.0), 6),
                "time_validation": round(outside.get(VALIDATION, 0.0), 6),
                "time_checkpoint": round(outside.get(CHECKPOINT, 0.0), 6),
            },
        )

    def _write(self, step: int, scalars: Mapping[str, float | int | None]) -> None:
        for sink in self._sinks:
            sink.log(step, scalars)

    def _note_memory(self, gib: float, percent: float) -> None:
        self._peak_memory = max(self._peak_memory, (gib, percent))


def _device_name_and_synchronize(device: torch.device) -> tuple[str, Callable[[], None] | None]:
    if device.type != "cuda":
        return device.type, None
    import torch

    return torch.cuda.get_device_name(device), partial(torch.cuda.synchronize, device)
