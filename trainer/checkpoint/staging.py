"""Copies of a rank's share on the host, from which a save is written while training goes on.

``async``                 fresh memory for each save; training stands still while the device copies into it
``async_with_pinned_mem`` page-locked memory that is kept from save to save, and a stream of its own

What only the optimizer's step changes (parameters and moments) may be copied by that stream while the next
forward and backward run: `before_update` makes the step wait, on the device, for the copies. The rest is
small and copied at once.

Either way the copies are a snapshot: what is written does not depend on what training does meanwhile. Both
need host memory for the share; the pinned kind keeps it until the run ends. Pinning goes through
``cudaHostRegister``, since torch's own allocator of pinned memory rounds sizes up to powers of two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from trainer.checkpoint.writer import DTYPES, Box, to_host

log = logging.getLogger(__name__)

_ALIGNMENT = 64
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Staging:
    """See the module; one object a run.

    Args:
        pinned: Page-locked memory and a stream of its own; without a CUDA device it is as if False.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned and torch.cuda.is_available()
        if pinned and not self._pinned:
            log.warning("checkpoint.async_mode: no CUDA device: 'async_with_pinned_mem' is as 'async'")
        self._buffers: dict[Box, Tensor] = {}
        self._registered: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def take(
        self, boxes: Sequence[Box], live: Callable[[Box], Tensor], updated: Collection[str]
    ) -> Callable[[Box], Tensor]:
        """Copy `boxes`; what this returns gives each one's copy, once it is complete.

        Args:
            boxes: What this rank writes.
            live: Gives a box's elements, in the memory that training uses.
            updated: Keys of tensors that nothing but the optimizer's step changes.
        """
        if not self._pinned:
            copies = {box: _own_copy(live(box), box) for box in boxes}
            return copies.__getitem__
        self._prepare(boxes)
        with torch.no_grad():
            late = {box for box in boxes if box.key in updated and live(box).is_cuda}
            for box in boxes:
                if box not in late:
                    self._buffers[box].copy_(live(box))
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for box in late:
                    source = live(box).to(self._buffers[box].dtype)
                    self._buffers[box].copy_(source, non_blocking=True)
                copied = self._copied = torch.cuda.Event()
                copied.record()

        def host(box: Box) -> Tensor:
            copied.synchronize()
            return self._buffers[box]

        return host

    def before_update(self) -> None:
        """Make what the device does from here on wait until the parameters are copied; the host does not."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def release(self) -> None:
        """Give the memory back; nothing may be copied or written any more."""
        if self._registered:
            torch.cuda.synchronize()
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        self._buffers.clear()

    def _prepare(self, boxes: Sequence[Box]) -> None:
        """Allocate what `boxes` need beyond what is there, in one piece: pages are pinned whole."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        new = [box for box in boxes if box not in self._buffers]
        if not new:
            return
        started = time.perf_counter()
        sizes = [-(-box.nbytes // _ALIGNMENT) * _ALIGNMENT for box in new]
        arena = torch.zeros(sum(sizes), dtype=torch.uint8)
        error = int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
        for box, piece in zip(new, arena.split(sizes), strict=True):
            flat = piece[: box.nbytes].view(_TORCH_DTYPES[box.dtype])
            self._buffers[box] = flat.reshape(box.shape)
        if error:
            log.warning("checkpoint: CUDA error %d: memory could not be pinned, copies are slower", error)
            return
        self._registered.append(arena.data_ptr())
        seconds = time.perf_counter() - started
        log.info(
            "checkpoint: %.1f GB of host memory pinned in %.1fs, for all saves", arena.nbytes / 1e9, seconds
        )


def _own_copy(tensor: Tensor, box: Box) -> Tensor:
    host = to_host(tensor, box)
    # On a CPU, to_host may have given the live tensor itself.
    return host.clone() if host.data_ptr() == tensor.data_ptr() else host
