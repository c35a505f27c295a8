"""Copies of a rank's share on the host, from which a save is written while training goes on.

``async``                 fresh memory for each save; training stands still while the device copies into it
``async_with_pinned_mem`` page-locked memory that is kept from save to save, and a stream of its own

What only the optimizer's step changes (parameters and moments) may be copied by that stream while the next
forward and backward run: `before_update` makes the step wait, on the device, for the copies. The rest is
small and copied at once.

Either way the copies are a snapshot: what is written does not depend on what training does meanwhile. Both
need host memory for the share; the pinned kind keeps it until the run ends. `reserve` takes it before the
first step: pinning costs seconds for tens of GB. It goes through ``cudaHostRegister``, since torch's own
allocator of pinned memory rounds sizes up to powers of two.

Without a CUDA device the memory is kept all the same, not page-locked, and training waits for the copies.
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
        pinned: Memory that is kept; on a CUDA device page-locked, with a stream of its own.
    """

    def __init__(self, pinned: bool) -> None:
        self._kept = pinned
        self._overlaps = pinned and torch.cuda.is_available()
        if pinned and not self._overlaps:
            log.warning("checkpoint.async_mode: no CUDA device: training waits for copies, as with 'async'")
        self._buffers: dict[Box, Tensor] = {}
        self._registered: list[int] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @staticmethod
    def bytes_for(boxes: Sequence[Box]) -> int:
        """Host memory that copies of `boxes` take."""
        return sum(_room(box) for box in boxes)

    @property
    def reserved_bytes(self) -> int:
        """Host memory that is kept for copies."""
        return self.bytes_for(list(self._buffers))

    def reserve(self, boxes: Sequence[Box]) -> None:
        """Allocate what `boxes` need beyond what is there, in one piece: pages are pinned whole."""
        new = [box for box in boxes if box not in self._buffers]
        if not new or not self._kept:
            return
        started = time.perf_counter()
        arena = torch.zeros(self.bytes_for(new), dtype=torch.uint8)
        pinned = self._pin(arena)
        for box, piece in zip(new, arena.split([_room(box) for box in new]), strict=True):
            flat = piece[: box.nbytes].view(_TORCH_DTYPES[box.dtype])
            self._buffers[box] = flat.reshape(box.shape)
        log.info(
            "checkpoint: %.3g GB of host memory %s in %.1fs, for all saves",
            arena.nbytes / 1e9,
            "pinned" if pinned else "reserved",
            time.perf_counter() - started,
        )

    def take(
        self, boxes: Sequence[Box], live: Callable[[Box], Tensor], updated: Collection[str]
    ) -> Callable[[Box], Tensor]:
        """Copy `boxes`; what this returns gives each one's copy, once it is complete.

        Args:
            boxes: What this rank writes.
            live: Gives a box's elements, in the memory that training uses.
            updated: Keys of tensors that nothing but the optimizer's step changes.
        """
        if not self._kept:
            copies = {box: _own_copy(live(box), box) for box in boxes}
            return copies.__getitem__
        self.reserve(boxes)
        late = [box for box in boxes if self._overlaps and box.key in updated and live(box).is_cuda]
        with torch.no_grad():
            for box in set(boxes).difference(late):
                self._buffers[box].copy_(live(box))
            copied = self._copied = self._copy_beside(late, live) if late else None

        def host(box: Box) -> Tensor:
            if copied is not None:
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

    def _copy_beside(self, boxes: Sequence[Box], live: Callable[[Box], Tensor]) -> torch.cuda.Event:
        """Copy on a stream of its own, after what the device has to do now; the event is their end."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for box in boxes:
                self._buffers[box].copy_(live(box).to(self._buffers[box].dtype), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return copied

    def _pin(self, arena: Tensor) -> bool:
        """Page-lock memory; whether it is."""
        if not self._overlaps:
            return False
        error = int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0))
        if error:
            log.warning("checkpoint: CUDA error %d: memory could not be pinned, copies are slower", error)
            return False
        self._registered.append(arena.data_ptr())
        return True


def _room(box: Box) -> int:
    return -(-box.nbytes // _ALIGNMENT) * _ALIGNMENT


def _own_copy(tensor: Tensor, box: Box) -> Tensor:
    host = to_host(tensor, box)
    # On a CPU, to_host may have given the live tensor itself.
    return host.clone() if host.data_ptr() == tensor.data_ptr() else host
