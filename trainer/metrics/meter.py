"""Where a run's time goes, and its throughput.

Each moment of a run belongs to one phase. Phases nest and the innermost counts: a compile inside a
validation is compile time. So the phases' times add up to the wall time, and nothing counts twice.

Throughput is measured on two of them, training and data loading::

    elapsed = training + data loading, since the last reading
    tps     = tokens of this data-parallel rank since then / (elapsed * cp * tp * pp)
    tflops  = tps * F / 1e12
    mfu     = 100 * tflops / peak

Compile, validation and checkpoints are outside elapsed and reported apart. The ranks of a cp, tp or pp
group train the same tokens together, so each has its share of them; tps is per device.

Times are the host's. A GPU runs behind it, so `synchronize` is called where a phase outside tps begins and
ends and at each reading: queued training work is then not taken for validation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.metrics.flops import mfu_percent, tflops_per_device

logger = logging.getLogger(__name__)

TRAINING = "training"
DATA_LOADING = "data_loading"
COMPILE = "compile"
VALIDATION = "validation"
CHECKPOINT = "checkpoint"


class PhaseClock:
    """Seconds by phase; the innermost open phase counts, and training where none is open.

    Phases may open and close in another thread: autograd compiles backward graphs in its own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._last = clock()

    def enter(self, name: str) -> None:
        """Open a phase."""
        with self._lock:
            self._settle()
            self._open.append(name)

    def leave(self, name: str) -> None:
        """Close the innermost open phase of this name; nothing happens where none is open."""
        with self._lock:
            self._settle()
            for index in reversed(range(len(self._open))):
                if self._open[index] == name:
                    del self._open[index]
                    return

    @property
    def current(self) -> str:
        """The phase that counts now; any thread may ask."""
        innermost = self._open[-1:]
        return innermost[0] if innermost else TRAINING

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Open a phase for the block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def seconds(self) -> dict[str, float]:
        """Seconds so far by phase; training is there always."""
        with self._lock:
            self._settle()
            return {TRAINING: 0.0, **self._seconds}

    def _settle(self) -> None:
        now = self._clock()
        name = self._open[-1] if self._open else TRAINING
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class Throughput:
    """One reading: rates since the reading before. Seconds per step are means over its steps."""

    steps: int
    tokens: int
    """Tokens of this data-parallel rank."""
    elapsed_seconds: float
    """Training and data loading: what the rates divide by."""
    tps: float
    tflops: float
    mfu: float | None
    end_to_end_seconds_per_step: float
    data_loading_seconds_per_step: float
    data_loading_percent: float
    phase_seconds: dict[str, float]
    """Seconds by phase since the reading before, those outside `elapsed_seconds` included."""


@dataclass(frozen=True)
class Window:
    """What was counted up to a step whose time is not known yet."""

    steps: int
    tokens: int
    total_steps: int
    total_tokens: int
    elapsed_seconds: float
    """Since the start, when the host had launched the last of it."""


class ThroughputMeter:
    """Counts tokens and time, and makes rates of them.

    Args:
        flops_per_token: F of `trainer.metrics.flops`, of the whole model.
        peak_tflops: Dense bf16 peak of one device; None where unknown.
        non_data_parallel_degree: cp * tp * pp, the devices that train the same tokens together.
        clock: Seconds from any origin; a test passes its own.
        synchronize: Waits for the device to finish what is queued; None on a CPU.
    """

    def __init__(
        self,
        *,
        flops_per_token: int,
        peak_tflops: float | None,
        non_data_parallel_degree: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak_tflops = peak_tflops
        self._non_data_parallel_degree = non_data_parallel_degree
        self._clock = clock
        self._synchronize = synchronize or (lambda: None)
        self._compile_watch: CompileWatch | None = None
        self.start()

    def start(self) -> None:
        """Set all counts to zero. Call it where the first step begins; the constructor does too."""
        self.phases = PhaseClock(self._clock)
        if self._compile_watch is not None:
            self._compile_watch.phases = self.phases
            self._compile_watch.start()
        self.total_steps = 0
        self.total_tokens = 0
        self._window_steps = 0
        self._window_tokens = 0
        self._at_last_read = self.phases.seconds()
        # What came before this is warm-up: the steps up to the first reading.
        self._warmup: tuple[int, int, float] | None = None

    def watch_compile(self) -> bool:
        """Take the time that torch.compile compiles out of tps. False where this torch cannot tell it."""
        self._compile_watch = CompileWatch(self.phases)
        return self._compile_watch.start()

    def stop(self) -> None:
        """Stop watching torch.compile."""
        if self._compile_watch is not None:
            self._compile_watch.stop()

    @contextmanager
    def data_loading(self) -> Iterator[None]:
        """Around the wait for a batch. It is inside tps, and reported."""
        with self.phases.phase(DATA_LOADING):
            yield

    @contextmanager
    def excluded(self, name: str) -> Iterator[None]:
        """Around work that is not training ("validation", "checkpoint", ...). It is outside tps."""
        self._synchronize()
        self.phases.enter(name)
        try:
            yield
            self._synchronize()
        finally:
            self.phases.leave(name)

    def count_step(self, tokens: int) -> None:
        """Count an optimizer step that trained `tokens` tokens on this data-parallel rank."""
        self.total_steps += 1
        self.total_tokens += tokens
        self._window_steps += 1
        self._window_tokens += tokens

    def close_window(self) -> Window:
        """Begin to count for the next reading; this one's is taken by ``read(window)`` when its work is done.

        A host that is ahead of its device need not wait for that here: it counts the steps that follow, and
        reads when it learns that the device has come this far.
        """
        launched = _elapsed(self.phases.seconds())
        window = Window(
            self._window_steps, self._window_tokens, self.total_steps, self.total_tokens, launched
        )
        self._window_steps = self._window_tokens = 0
        return window

    def read(self, closed: Window | None = None, seconds_ago: float = 0.0) -> Throughput:
        """Rates since the last reading; the next reading starts where this one ends.

        Args:
            closed: Its steps are done. None: those up to here, which the device is waited for.
            seconds_ago: Since when they are.
        """
        if closed is None:
            self._synchronize()
            closed = self.close_window()
        now = self.phases.seconds()
        # Not longer ago than they were launched, in time that counts: a compilation may have come between.
        now[TRAINING] -= min(seconds_ago, _elapsed(now) - closed.elapsed_seconds)
        window = {name: seconds - self._at_last_read.get(name, 0.0) for name, seconds in now.items()}
        elapsed = _elapsed(window)
        data_loading = window.get(DATA_LOADING, 0.0)
        steps = closed.steps
        tps, tflops, mfu = self._rates(closed.tokens, elapsed)
        self._at_last_read = now
        if self._warmup is None:
            self._warmup = (closed.total_steps, closed.total_tokens, _elapsed(now))
        return Throughput(
            steps=steps,
            tokens=closed.tokens,
            elapsed_seconds=elapsed,
            tps=tps,
            tflops=tflops,
            mfu=mfu,
            end_to_end_seconds_per_step=elapsed / max(steps, 1),
            data_loading_seconds_per_step=data_loading / max(steps, 1),
            data_loading_percent=100 * data_loading / elapsed if elapsed > 0 else 0.0,
            phase_seconds=window,
        )

    @property
    def is_warming_up(self) -> bool:
        """Whether nothing has been read yet."""
        return self._warmup is None

    def mean_after_warmup(self) -> Throughput | None:
        """Rates over all steps after the first reading; None where there are none."""
        self._synchronize()
        if self._warmup is None:
            return None
        warmup_steps, warmup_tokens, warmup_elapsed = self._warmup
        now = self.phases.seconds()
        steps = self.total_steps - warmup_steps
        tokens = self.total_tokens - warmup_tokens
        elapsed = _elapsed(now) - warmup_elapsed
        if steps <= 0 or elapsed <= 0:
            return None
        tps, tflops, mfu = self._rates(tokens, elapsed)
        return Throughput(
            steps=steps,
            tokens=tokens,
            elapsed_seconds=elapsed,
            tps=tps,
            tflops=tflops,
            mfu=mfu,
            end_to_end_seconds_per_step=elapsed / steps,
            data_loading_seconds_per_step=0.0,
            data_loading_percent=0.0,
            phase_seconds={},
        )

    def _rates(self, tokens: int, elapsed: float) -> tuple[float, float, float | None]:
        tps = tokens / (elapsed * self._non_data_parallel_degree) if elapsed > 0 else 0.0
        tflops = tflops_per_device(tps, self._flops_per_token)
        return tps, tflops, mfu_percent(tflops, self._peak_tflops)


def _elapsed(seconds: dict[str, float]) -> float:
    return seconds.get(TRAINING, 0.0) + seconds.get(DATA_LOADING, 0.0)


class CompileWatch:
    """Opens the compile phase while torch.compile compiles, forward or backward, on any thread.

    It hangs on the callbacks that torch._dynamo runs around the outermost compilation. `torch._dynamo` is
    not a public module: where the callbacks are missing, compile time is counted as training.
    """

    def __init__(self, phases: PhaseClock) -> None:
        self.phases = phases
        self._handler = None

    def start(self) -> bool:
        """Begin to watch, or again after `torch._dynamo.reset`, which drops all callbacks.

        Returns:
            False where this torch has no such callbacks.
        """
        try:
            from torch._dynamo.callback import callback_handler

            if self._on_start not in callback_handler.start_callbacks:
                callback_handler.register_start_callback(self._on_start)
            if self._on_end not in callback_handler.end_callbacks:
                callback_handler.register_end_callback(self._on_end)
        except (ImportError, AttributeError):
            logger.warning("this torch does not tell when it compiles: compile time is counted in tps")
            return False
        self._handler = callback_handler
        return True

    def stop(self) -> None:
        """Stop watching."""
        if self._handler is None:
            return
        handler, self._handler = self._handler, None
        # They may be gone: see start().
        if self._on_start in handler.start_callbacks:
            handler.remove_start_callback(self._on_start)
        if self._on_end in handler.end_callbacks:
            handler.remove_end_callback(self._on_end)

    def _on_start(self, *_: object) -> None:
        self.phases.enter(COMPILE)

    def _on_end(self, *_: object) -> None:
        self.phases.leave(COMPILE)
