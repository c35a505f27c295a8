"""Median times of small pieces of work on one device.

On a GPU the pieces are timed with CUDA events, as they would find the device in the middle of a step:

- the L2 cache is cold: before each repetition a buffer of several times its size is read (read, not written:
  the timed work would pay for writing dirty lines back);
- the host does not count: before each repetition the device waits for a little longer than the host takes
  to enqueue the work, so that kernels follow each other as in a queue that is never empty;
- clocks and temperature are shared fairly: pieces that are to be compared take turns, a few repetitions each.

On a CPU the clock of the wall is read; such times are for debugging.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]

_ROUNDS = 3
_WARM_UP = 3
_CYCLES_PER_SECOND = 2.0e9
_LONGEST_WAIT_SECONDS = 0.05


@dataclass(frozen=True)
class Times:
    """What repetitions of one piece of work took, in seconds."""

    median: float
    low: float
    """A tenth of the repetitions were faster."""
    high: float
    """A tenth were slower."""
    repetitions: int

    @property
    def spread_percent(self) -> float:
        """From `low` to `high`, in percent of the median."""
        return 100 * (self.high - self.low) / self.median


def summarize(seconds: list[float]) -> Times:
    """Median and tenths of some repetitions (at least one)."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return Times(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def time_in_turns(works: Mapping[str, Work], device: torch.device, repetitions: int = 30) -> dict[str, Times]:
    """Time each piece of work; the first call of each, which may compile, is not timed.

    Args:
        works: Name -> function that runs the work once, and on a GPU enqueues it on the current stream.
        device: Where they run; the current one where it is a GPU.
        repetitions: Timed calls of each, dealt over a few rounds.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _WallClock()
    for work in works.values():
        for _ in range(_WARM_UP):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    rounds = min(_ROUNDS, repetitions)
    for turn in range(rounds):
        count = (repetitions * (turn + 1)) // rounds - (repetitions * turn) // rounds
        for name, work in works.items():
            seconds[name] += clock.time(work, count)
    return {name: summarize(found) for name, found in seconds.items()}


class _WallClock:
    """Seconds of the host."""

    def time(self, work: Work, repetitions: int) -> list[float]:
        """Of each repetition."""
        found = []
        for _ in range(repetitions):
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
        return found


class _CudaClock:
    """Seconds between two events on the current stream, the cache cold and the queue full."""

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(max(4 * cache_bytes, 256 << 20) // 4, dtype=torch.float32, device=device)

    def time(self, work: Work, repetitions: int) -> list[float]:
        """Of each repetition, after one that is not counted and shows what the host needs."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        wait = min(1.5 * host + 50e-6, _LONGEST_WAIT_SECONDS)
        events = []
        for _ in range(repetitions):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.amax()
            torch.cuda._sleep(int(wait * _CYCLES_PER_SECOND))
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]
