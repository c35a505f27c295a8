"""Requests to stop, as they reach one process. Torch-free.

SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the run to save and stop; a second one ends the process at once, with
exit code 128 + n. Python runs a signal's handler only between two steps of the main thread, which may be
waiting for another rank; so the handlers here do nothing, and a thread learns of the signal through a pipe
that the C handler writes to. It counts, and it can leave whatever the main thread does.

Who sends them::

    a terminal, `kill`      -> the launcher   -> forwarded to its workers
    a scheduler             -> often to every process of the job, launcher and workers alike
    an operator             -> perhaps to one worker only; the ranks agree: `trainer.resilience.stopping`

The second kind would reach a worker twice and end it. So the launcher forwards under another number, a
real-time signal, and a worker counts what came directly and what was forwarded apart: the larger count is
the number of requests.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from types import FrameType

from trainer.resilience.exit_codes import ended_by

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a run to save and stop."""
FORWARDED = {number: signal.SIGRTMIN + 5 + index for index, number in enumerate(REQUESTS)}
"""Signal -> the number under which the launcher passes it on."""
_ORIGINAL = {forwarded: number for number, forwarded in FORWARDED.items()}
_PR_SET_PDEATHSIG = 1


def handled_signals() -> list[int]:
    """The requests that this process takes: one that it was started to ignore (nohup) stays ignored."""
    return [number for number in REQUESTS if _is_taken(number)]


class SignalWatch:
    """Counts requests to stop; see the module. `install` begins, in the main thread."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._first: int | None = None
        self._direct: Counter[int] = Counter()
        self._forwarded: Counter[int] = Counter()
        self._ignoring = False
        self._former: dict[int, object] = {}
        self._read = self._write = -1

    @property
    def requested(self) -> int | None:
        """The first signal that asked to stop, or None."""
        return self._first

    def ignore_from_now(self) -> None:
        """The run is over: what comes now changes nothing."""
        self._ignoring = True

    def install(self) -> SignalWatch:
        """Begin to listen. The end of the launcher counts as SIGTERM: nobody would wait for this process."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in [*handled_signals(), *_ORIGINAL]:
            self._former[number] = signal.signal(number, _do_nothing)
        threading.Thread(target=self._listen, name="octavo-signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)

    def _listen(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:
                self._count(number)
        os.close(self._read)

    def _count(self, number: int) -> None:
        original = _ORIGINAL.get(number, number)
        if original not in REQUESTS:
            return
        (self._forwarded if number in _ORIGINAL else self._direct)[original] += 1
        if self._first is None:
            self._first = original
        elif max(self._direct.total(), self._forwarded.total()) > 1 and not self._ignoring:
            name = signal.Signals(original).name
            with suppress(OSError):
                os.write(2, f"{self._name}ended at once by a second signal, {name}: not saved\n".encode())
            os._exit(ended_by(original))


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies: workers are sessions of their own."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_taken(number: int) -> bool:
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the pipe to be written to."""


def signal_name(number: int) -> str:
    """SIGKILL, or `signal 40` where it has no name."""
    number = _ORIGINAL.get(number, number)
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
