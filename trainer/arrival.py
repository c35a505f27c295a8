"""Numbers on their way from the device to the host, which goes on meanwhile.

A host that asks a GPU for a number waits for all that was launched before, and the GPU then waits for the
host: with nothing queued, it goes at the speed at which kernels are launched. A number that is read one step
later costs neither a wait.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Arrival:
    """A copy of `values`, of any device, that the host may read when it is there; a CPU's are at once."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._device, self._ready = values, values.device, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event(enable_timing=True)
            self._ready.record()

    @property
    def is_here(self) -> bool:
        """Whether `wait` would return at once."""
        return self._ready is None or self._ready.query()

    def wait(self) -> Tensor:
        """The numbers, on the host."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values

    def seconds_ago(self) -> float:
        """For how long the numbers have been here, by the device's clock; waits for them."""
        if self._ready is None:
            return 0.0
        self._ready.synchronize()
        now = torch.cuda.Event(enable_timing=True)
        now.record(_idle_stream(self._device))
        now.synchronize()
        return max(0.0, self._ready.elapsed_time(now) / 1e3)


@functools.cache
def _idle_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream without work: what is recorded on it happens at once."""
    return torch.cuda.Stream(device)
