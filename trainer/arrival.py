"""Numbers on their way from the device to the host, which goes on meanwhile.

A host that asks a GPU for a number waits for all that was launched before, and the GPU then waits for the
host: with nothing queued, it goes at the speed at which kernels are launched. A number that is read one step
later costs neither a wait.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Arrival:
    """A copy of `values`, of any device, that the host may read when it is there; a CPU's are at once."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._ready = values, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
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
