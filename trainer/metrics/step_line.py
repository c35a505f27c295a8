"""The lines that a run prints while it trains: step, validation, progress.

The step line is fixed; people's parsers read it (numbers are padded to a width)::

    step: 1  loss: 7.62471  grad_norm: 1.4143  memory: 0.94GiB(1.19%)  tps: 7,034  tflops: 407.37  mfu: 41.19%

No other line holds ``step:``, ``memory:`` or ``tps:``. With colours, the text between the escape
sequences is the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

_RESET = "\x1b[0m"
_DIM = "\x1b[2m"
_COLORS = {
    "step": "\x1b[31m",
    "loss": "\x1b[32m",
    "grad_norm": "\x1b[33m",
    "memory": "\x1b[36m",
    "tps": "\x1b[34m",
    "tflops": "\x1b[35m",
    "mfu": "\x1b[95m",
}


def use_colors(stream: TextIO, *, disabled: bool = False) -> bool:
    """True where colours are wanted: a terminal, unless the config or the environment says otherwise.

    The environment's ``NO_COLOR`` switches them off and ``FORCE_COLOR`` on, for a launcher that reads the
    workers' output through a pipe and itself writes to a terminal.
    """
    if disabled or os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def format_step_line(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    memory_gib: float,
    memory_percent: float,
    tps: float,
    tflops: float,
    mfu: float | None,
    color: bool = False,
) -> str:
    """The step line.

    Args:
        step: Step of the optimizer, from 1.
        loss: Mean over the valid tokens of the global batch.
        grad_norm: Before clipping.
        memory_gib: Peak reserved since the last line, per device.
        memory_percent: The same in percent of the device's memory.
        tps: Tokens per second per device; printed as a whole number.
        tflops: TFLOP/s per device.
        mfu: Percent of the peak; None, an unknown device, prints n/a.
        color: Whether to add ANSI colours.
    """
    fields = {
        "step": f"step: {step:2}",
        "loss": f"loss: {loss:8.5f}",
        "grad_norm": f"grad_norm: {grad_norm:7.4f}",
        "memory": f"memory: {memory_gib:5.2f}GiB({memory_percent:.2f}%)",
        "tps": f"tps: {round(tps):,}",
        "tflops": f"tflops: {tflops:,.2f}",
        "mfu": "mfu: n/a" if mfu is None else f"mfu: {mfu:.2f}%",
    }
    if color:
        return "  ".join(f"{_COLORS[name]}{text}{_RESET}" for name, text in fields.items())
    return "  ".join(fields.values())


def format_validation_line(*, step: int, loss: float, seconds: float, color: bool = False) -> str:
    """The line of a validation run after `step`, which took `seconds`."""
    text = f"validation at {step}  loss {loss:8.5f}  ({format_seconds(seconds)})"
    return f"{_COLORS['loss']}{text}{_RESET}" if color else text


def format_seconds(seconds: float) -> str:
    """A duration for people: 4.2s, 1m 12s, 3h 05m, 2d 04h."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}h"


class Progress:
    """An occasional hint of how far the run is and how long it takes still.

    One hint per tenth of the run at most, none within `min_seconds` of the last, so a short run prints
    none. The time left is what the steps since the first hint took, times the steps to come: validation
    and checkpoints are in it, start-up and compile are not.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        min_seconds: float = 15.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps = total_steps
        self._min_seconds = min_seconds
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last_tenth = 0
        self._last_time = 0.0

    def hint(self, step: int, *, color: bool = False) -> str | None:
        """The hint after `step`, or None where it is not yet time for one. Call it at each step line."""
        now = self._clock()
        tenth = 10 * step // self._total_steps
        if self._first is None:
            self._first = (step, now)
            self._last_tenth, self._last_time = tenth, now
            return None
        first_step, first_time = self._first
        finished = step >= self._total_steps
        if finished or tenth <= self._last_tenth or now - self._last_time < self._min_seconds:
            return None
        self._last_tenth, self._last_time = tenth, now
        left = (now - first_time) / (step - first_step) * (self._total_steps - step)
        percent = 100 * step // self._total_steps
        text = f"progress: {step} of {self._total_steps} ({percent} %), {format_seconds(left)} left"
        return f"{_DIM}{text}{_RESET}" if color else text
