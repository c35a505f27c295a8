"""Writing the saves of a run, one at a time: at once, or in a background thread from copies on the host.

    saver.reserve(boxes)                      before step 1, with 'async_with_pinned_mem'
    saver.write(tensors, manifest, ...)       at once; or copies, and begins to write
    saver.before_update()                     before each optimizer step
    saver.wait(); saver.take_failure()        before the next save, and at the end

A save that fails removes what it wrote. Its message waits for `take_failure`: whoever saves decides whether
the run ends with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import folders
from trainer.checkpoint.choose import is_complete
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.host_memory import check_host_memory
from trainer.checkpoint.manifest import MODEL_ONLY, Manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.remote import Place
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writer import Box, Plan, local_data, make_plan, to_host, write_checkpoint

log = logging.getLogger(__name__)

PINNED = "async_with_pinned_mem"


class Saver:
    """See the module. All ranks make one and make the same calls.

    Args:
        root: Where the step-N folders lie.
        config: Whether training goes on meanwhile, and how many are kept.
        ranks: All of them.
    """

    def __init__(self, root: Place, config: CheckpointConfig, ranks: Ranks) -> None:
        self._root, self._config, self._ranks = root, config, ranks
        self._staging = Staging(pinned=config.async_mode == PINNED)
        self._writing: threading.Thread | None = None
        self._failure: str | None = None
        self._crash: Exception | None = None
        self.longest_seconds = 0.0
        """Of a save so far, from its begin to its end on disk."""

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the host memory that is kept for all saves: the first one stalls no longer than others.

        Args:
            tensors: Of the state that will be saved, by key; their values do not matter.

        Raises:
            ConfigError: this host has not enough for its ranks' shares.
        """
        if self._config.async_mode != PINNED:
            return
        mine = make_plan(tensors, None, self._ranks)[self._ranks.rank]
        check_host_memory(Staging.bytes_for(mine), self._ranks)
        self._staging.reserve(mine)

    def write(
        self,
        tensors: Mapping[str, Tensor],
        manifest: Manifest,
        started: float,
        *,
        updated: Collection[str] = (),
        export: torch.dtype | None = None,
        at_once: bool = False,
    ) -> None:
        """Write `tensors`, or begin to; nothing may be under way.

        Args:
            tensors: By key; they share memory with the run's.
            manifest: Everything else.
            started: When the save began, of `time.perf_counter`.
            updated: Keys of tensors that nothing but the optimizer's step changes.
            export: Dtype in the file of those that are floats; None for their own.
            at_once: Whatever the mode, return when it is written.
        """
        plan = make_plan(tensors, export, self._ranks)
        if at_once or self._config.async_mode == "disabled":
            self._write(plan, lambda box: to_host(local_data(tensors, box), box), manifest, started)
            return
        mine: Sequence[Box] = plan[self._ranks.rank]
        staged = self._staging.take(mine, lambda box: local_data(tensors, box), updated)
        log.info("checkpoint: step-%d copied, training stood still for %.2fs", manifest.step, since(started))
        work = partial(self._write, plan, staged, manifest, started)
        self._writing = threading.Thread(target=self._in_background, args=(work,), daemon=True)
        self._writing.start()

    def before_update(self) -> None:
        """Called before the optimizer's step, which must not overtake a snapshot that is being copied."""
        self._staging.before_update()

    def wait(self) -> None:
        """Return when nothing is under way."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
            crash, self._crash = self._crash, None
            if crash is not None:
                raise crash

    def take_failure(self) -> str | None:
        """Why the last save failed, once; None where it did not."""
        failure, self._failure = self._failure, None
        return failure

    def release(self) -> None:
        """Give the memory back; nothing may be under way."""
        self._staging.release()

    def _in_background(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a thread's exception would be lost: it is raised at the next wait
            self._crash = error

    def _write(self, plan: Plan, host: Callable[[Box], Any], manifest: Manifest, started: float) -> None:
        target = folders.step_folder(self._root, manifest.step)
        try:
            size = write_checkpoint(target, plan, host, manifest, self._ranks)
            gone = self._ranks.first_does(lambda: self._prune(manifest.step))
        except CheckpointError as error:
            self._failure = str(error)
            return
        self.longest_seconds = max(self.longest_seconds, since(started))
        only = ", model only" if manifest.content == MODEL_ONLY else ""
        rest = f"; removed {', '.join(f'step-{step}' for step in gone)}" if gone else ""
        log.info("checkpoint: saved %s (%.1f MB%s, %.1fs)%s", target, size / 1e6, only, since(started), rest)

    def _prune(self, saved: int) -> list[int]:
        try:
            return folders.prune(self._root, self._config.keep_latest_k, saved, is_complete)
        except OSError as error:
            log.warning("checkpoint: could not remove old ones in %s: %s", self._root, error.strerror)
            return []


def since(started: float) -> float:
    """Seconds from `started`, of `time.perf_counter`."""
    return time.perf_counter() - started
