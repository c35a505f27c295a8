"""When a run stops before its end, and when the clock asks for a save: decided by all ranks together.

A signal may reach one rank only, and clocks differ; if one rank stopped by itself, the others would wait for
it in a collective. So the ranks compare once a step, after each has its batch and before any starts to
compute::

    batch of step s+1 -> agreement -> forward ... optimizer -> (save) -> batch of step s+2 -> agreement ...

There the model is as step s left it, so what is saved has every step that was begun. The batch that was
fetched for nothing is given back. A rank that waits for data gives up waiting when it is asked to stop, so a
stalled file system does not stop the others from saving.

The agreement is one MAX all-reduce of three integers over gloo, between hosts: no GPU is waited for. A GPU
works through the step before meanwhile, since a host runs ahead of it. (A result that is read one step later
would not be waited for either, but a signal would then cost one more step, and a rank that gives up on data
could not say so in time.) A validation compares before each of its batches and is given up.

`training.max_minutes` counts from the start of the launcher, so over restarts. The run stops early enough for
its longest step so far and its longest save so far to fit in.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.resilience.exit_codes import stopped_by
from trainer.resilience.notes import STARTED_VARIABLE
from trainer.resilience.signals import SignalWatch

_BY_CLOCK = 1000  # in place of a signal's number; above all of them


@dataclass(frozen=True)
class Stop:
    """Why the ranks stop."""

    signal: int | None
    """None: the time is over."""
    rank: int

    def exit_code(self, saved: bool) -> int:
        """What the run ends with."""
        return stopped_by(self.signal, saved)

    def __str__(self) -> str:
        if self.signal is None:
            return "training.max_minutes is over"
        return f"{signal.Signals(self.signal).name} came to rank {self.rank}"


class Stopping:
    """See the module. All ranks make one and make the same calls.

    Args:
        signals: This process's; None where nobody listens.
        max_minutes: Of the run, None without limit.
        interval_minutes: Between saves, 0 for none by the clock.
        timeout_seconds: How long a rank waits for the others.
        clock: Seconds since the epoch; a test passes its own.
    """

    def __init__(
        self,
        signals: SignalWatch | None,
        *,
        max_minutes: float | None = None,
        interval_minutes: float = 0.0,
        timeout_seconds: float = 300.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        timeout = timedelta(seconds=timeout_seconds)
        self.group = (
            dist.new_group(backend="gloo", timeout=timeout, group_desc="agreement") if several else None
        )
        self._rank = dist.get_rank() if several else 0
        self._signals, self._clock = signals, clock
        started = float(os.environ.get(STARTED_VARIABLE, clock()))
        self._deadline = None if max_minutes is None else started + 60 * max_minutes
        self._interval_seconds = 60 * interval_minutes
        self._last_save = clock()
        self._last_check: float | None = None
        self._longest_step = self._longest_save = 0.0
        self.stop: Stop | None = None
        self.save_due = False
        """Whether `checkpoint.interval_minutes` have passed: save after the step that comes."""
        self.all_have_batches = True
        """Whether no rank gave up waiting for its batch, at the last comparison before a step."""
        self.comparisons = 0

    def requested_here(self) -> bool:
        """Whether a signal has come to this rank; others may not know yet."""
        return self._signals is not None and self._signals.requested is not None

    def agreed(self, has_batch: bool = True) -> bool:
        """Compare with all ranks, before a step: True where all are to stop now.

        Args:
            has_batch: False where this rank gave up waiting for it.
        """
        now = self._clock()
        if self._last_check is not None:
            self._longest_step = max(self._longest_step, now - self._last_check)
        due = 0 < self._interval_seconds <= now - self._last_save
        wish, due_anywhere, lacking = self._largest(self._wish(now), int(due), int(not has_batch))
        while lacking and not wish:
            # A rank gave up waiting because another was asked to stop, which was here already by then.
            (wish,) = self._largest(self._wish(self._clock()))
        # What passes before the first step is over, compile included, is not typical of a step.
        self._last_check = None if self.comparisons == 0 else self._clock()
        self.comparisons += 1
        self.save_due, self.all_have_batches = bool(due_anywhere), not lacking
        return self._settle(wish)

    def agreed_within_step(self) -> bool:
        """The same in the middle of something that all ranks do, such as a validation."""
        wish, _ = self._largest(self._wish(self._clock()), 0)
        self.comparisons += 1
        return self._settle(wish)

    def saved(self, seconds: float) -> None:
        """A save took this long; the interval by the clock begins anew."""
        self._longest_save = max(self._longest_save, seconds)
        self._last_save = self._clock()
        self._last_check = self._last_save if self._last_check is not None else None
        self.save_due = False

    def set_timeout(self, seconds: float) -> None:
        """Wait this long for the others from now on."""
        if self.group is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), self.group)

    def _wish(self, now: float) -> int:
        """Why this rank would stop, and which it is, as one number; 0 where it would not."""
        if self._signals is not None and self._signals.requested is not None:
            return self._signals.requested << 32 | self._rank
        if self._deadline is not None and now + self._longest_step + self._longest_save >= self._deadline:
            return _BY_CLOCK << 32 | self._rank
        return 0

    def _largest(self, *values: int) -> list[int]:
        if self.group is None:
            return list(values)
        together = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.group)
        return together.tolist()

    def _settle(self, wish: int) -> bool:
        if wish:
            reason, rank = wish >> 32, wish & 0xFFFFFFFF
            self.stop = Stop(None if reason == _BY_CLOCK else reason, rank)
        return self.stop is not None
