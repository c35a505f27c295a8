"""Run an iterator ahead of its consumer, in a daemon thread with a bounded queue.

An error ends the thread and is raised to the consumer. The thread ends when the prefetcher is closed, when
it is garbage collected and when Python exits.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class WaitGivenUp(Exception):  # noqa: N818
    """The consumer was told to wait no longer."""


class _Failure(NamedTuple):
    error: BaseException


_END = object()
_LOOK_UP_SECONDS = 0.2


class Prefetcher:
    """Runs an iterator in a daemon thread, at most ``depth`` items ahead; with depth 0, in the caller.

    The thread refers to the queue and not to this object, so dropping the prefetcher ends the thread.

    Args:
        items: What to run.
        depth: Items ahead.
        uses_cuda: The items pin memory.
        give_up: Asked while the consumer waits; once it is true, `WaitGivenUp` is raised.
    """

    def __init__(
        self,
        items: Iterator[Any],
        depth: int,
        uses_cuda: bool,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._items = items
        self._give_up = give_up
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
        self._thread: threading.Thread | None = None
        self._finished = False
        self._closed = False
        if depth > 0:
            stop = threading.Event()
            # A thread starts on device 0; pinning there would open a second CUDA context.
            device = torch.cuda.current_device() if uses_cuda else None
            self._thread = threading.Thread(
                target=_fill, args=(items, self._ready, stop, device), name="octavo-data", daemon=True
            )
            self._thread.start()
            self._stop = weakref.finalize(self, _stop_thread, self._thread, self._ready, stop)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise RuntimeError("the data loader was closed, reloaded or iterated anew: call iter() again")
        if self._thread is None:
            return next(self._items)
        if self._finished:
            raise StopIteration
        item = self._wait()
        if item is _END or isinstance(item, _Failure):
            self._finished = True
            if isinstance(item, _Failure):
                raise item.error
            raise StopIteration
        return item

    def _wait(self) -> Any:
        while True:
            try:
                return self._ready.get(timeout=_LOOK_UP_SECONDS)
            except queue.Empty:
                if self._give_up():
                    raise WaitGivenUp from None

    def close(self) -> None:
        """End the thread; the items that it prepared are dropped."""
        self._closed = True
        if self._thread is not None:
            self._stop()


def _fill(items: Iterator[Any], ready: queue.Queue[Any], stop: threading.Event, device: int | None) -> None:
    """The thread's work: put every item, then `_END` or the error that ended them."""
    last: Any = _END
    try:
        if device is not None:
            torch.cuda.set_device(device)
        for item in items:
            if not _put(ready, item, stop):
                return
    except BaseException as error:
        last = _Failure(error)
    _put(ready, last, stop)


def _put(ready: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _stop_thread(thread: threading.Thread, ready: queue.Queue[Any], stop: threading.Event) -> None:
    stop.set()
    while not ready.empty():  # wakes the thread at once if it waits for room
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():  # garbage collection may run in the thread itself
        thread.join(timeout=5)
