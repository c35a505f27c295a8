"""The checkpoints of a run: what the trainer calls, and when something is saved.

    checkpoints = CheckpointManager(loaded, ranks ...)     chooses what to start from, before a model exists
    seed = checkpoints.seed or a drawn one                 a resumed run goes on with its seed
    ... build model, optimizer, data ...
    step, tokens = checkpoints.restore(state)
    while ...:
        train step
        if checkpoints.due(step): checkpoints.save(state, step, tokens)
    checkpoints.finish()

How a save is written, at once or in the background, is `trainer.checkpoint.saving`'s; one begins only when
the one before it has ended.

A save that fails leaves nothing behind and former checkpoints as they were. It ends the run where the user
must know: at step 1 (`enable_first_step_checkpoint` asks whether saving works) and at the last step.
In between it is an error on stderr, and the next interval tries again: a disk may be full for an hour.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import changes, fit, folders
from trainer.checkpoint.choose import Found, choose
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.manifest import FULL, MODEL_ONLY, Manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.remote import checkpoint_root
from trainer.checkpoint.saving import Saver, since
from trainer.checkpoint.state import RunState, model_tensors
from trainer.checkpoint.writer import MARGIN_BYTES
from trainer.config.errors import ConfigError
from trainer.config.load import Loaded
from trainer.interop.export import load_in_run, open_for_run, save_in_run
from trainer.interop.hf_folder import HfFolder

log = logging.getLogger(__name__)

_EXPORT = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class CheckpointManager:
    """See the module. All ranks make one and make the same calls.

    Raises:
        CheckpointError: on every rank, where a checkpoint that is needed cannot be used or written.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded, self._config = loaded, loaded.config.checkpoint
        self._last_step = loaded.config.training.steps
        self._root = checkpoint_root(loaded.config.job.dump_folder, self._config.folder)
        self._found: Found | None = None
        self._hf: HfFolder | None = None
        self._lock: int | None = None
        self._saved_step = -1
        if not self.active:
            return
        self._ranks = Ranks()
        self._saver = Saver(self._root, self._config, self._ranks)
        with self._ending():
            if self._saves:
                self._ranks.first_does(self._take_folder)
            if not self._config.create_seed_checkpoint:
                self._found = choose(self._config, self._root, self._ranks)
                if self._found is None and self._config.initial_load_in_hf:
                    self._hf = self._ranks.first_does(partial(open_for_run, loaded.config))

    @property
    def active(self) -> bool:
        """Whether anything is loaded or saved in this run."""
        return self._config.enable or self._config.create_seed_checkpoint

    @property
    def _saves(self) -> bool:
        return self.active and not self._config.load_only

    def seed(self, configured: int | None) -> int | None:
        """The seed to use: the configured one, or that of the run which is resumed; None to draw one."""
        if configured is None and self._found is not None and self._found.is_own:
            return self._found.manifest.train_state.get("seed")
        return configured

    def restore(self, state: RunState) -> tuple[int, int]:
        """Load what was chosen, and say so.

        Returns:
            (step, tokens seen) to go on from; (0, 0) in a fresh run.

        Raises:
            ConfigError: the configuration changed in a way that the checkpoint does not allow.
        """
        found = self._found
        if found is None:
            self._begin(state)
            self._make_room(state)
            return 0, 0
        started = time.perf_counter()
        manifest = found.manifest
        differences = changes.changed(manifest.config, state.config)
        model_only = self._model_only(found)
        excluded = self._config.exclude_from_loading

        def load() -> tuple[int, int]:
            if model_only:
                state.load_model(found.folder, manifest)
                return 0, 0
            return state.load(found.folder, manifest, excluded)

        with self._ending():
            try:
                self._ranks.all_do(lambda: state.check_model(manifest))
                fit.check_function(found, self._root, self._loaded.config)
                step, tokens = self._ranks.all_do(load)[0]
                if not model_only and manifest.content == FULL and "dataloader" not in excluded:
                    state.load_data(manifest)  # the same on every rank, and so is its error
            except CheckpointError as error:
                raise fit.misfit(found, self._root, str(error), differences) from None
            except ConfigError:
                raise
            except ValueError as error:
                raise fit.data_misfit(found, str(error)) from None
        self._saved_step = step if found.is_own else -1
        self._announce(found, state, step, tokens, time.perf_counter() - started)
        if found.is_own and differences:
            log.info("checkpoint: changed since: %s", changes.describe(differences))
        if step >= self._last_step:
            log.info("checkpoint: training.steps is %d: nothing is left to train", self._last_step)
        else:
            self._make_room(state)
        return step, tokens

    def _announce(self, found: Found, state: RunState, step: int, tokens: int, seconds: float) -> None:
        """Say what was loaded, and what was not."""
        manifest, model_only = found.manifest, self._model_only(found)
        how = "weights from" if model_only or manifest.content != FULL else "resumed from"
        at = f"step {step}, {tokens:,} tokens seen, " if step else ""
        log.info("checkpoint: %s %s (%s%.1fs)", how, found.folder, at, seconds)
        if self._config.exclude_from_loading and not model_only:
            log.info("checkpoint: not loaded: %s", ", ".join(self._config.exclude_from_loading))
        if found.is_own and state.world_size != manifest.train_state.get("world_size", state.world_size):
            log.info("checkpoint: saved by %s ranks, loaded by %d", *_worlds(manifest, state))

    def _model_only(self, found: Found) -> bool:
        return not found.is_own and self._config.initial_load_model_only

    def roll_back(self, state: RunState) -> tuple[int, int] | None:
        """Go back to the newest checkpoint, all but the position in the data.

        Returns:
            (step, tokens seen) to go on from; None where there is no checkpoint.
        """
        if not self.active:
            return None
        self._saver.wait()
        self._raise_failure(must_succeed=False)
        own = replace(self._config, load_step=-1, initial_load_path=None)
        with self._ending():
            found = choose(own, self._root, self._ranks)
            if found is None or found.manifest.content != FULL:
                return None
            place = self._ranks.all_do(lambda: state.load(found.folder, found.manifest, ()))[0]
        self._saved_step = place[0]
        return place

    @property
    def saves_at_stop(self) -> bool:
        """Whether a run that stops early can be gone on with."""
        return self._saves and self._config.enable

    def due(self, step: int, *, now: bool = False) -> bool:
        """Whether the state after `step` is to be saved; `now`: whatever the interval says."""
        if not self._saves or not self._config.enable or step == self._saved_step:
            return False
        first = step == 1 and self._config.enable_first_step_checkpoint
        return now or first or step % self._config.interval == 0 or step == self._last_step

    def save(self, state: RunState, step: int, tokens_seen: int, *, is_last: bool = False) -> None:
        """Save the state after `step`; in async mode, begin to, unless the run ends with it (`is_last`)."""
        self._saver.wait()
        self._raise_failure(must_succeed=False)
        started = time.perf_counter()
        if step == self._last_step and self._config.last_save_in_hf:
            self._save_hf(state, step)
            return
        model_only = step == 0 or (step == self._last_step and self._config.last_save_model_only)
        content = MODEL_ONLY if model_only else FULL
        export = _EXPORT[self._config.export_dtype] if model_only and step > 0 else None
        settings = changes.model_settings(self._loaded.config)
        manifest = replace(state.manifest(step, tokens_seen, content), model=settings)
        self._saved_step = step
        self._saver.write(
            state.tensors(content),
            manifest,
            started,
            updated=state.updated_keys(),
            export=export,
            at_once=model_only,  # the run ends with it
        )
        if must_succeed := is_last or step in (0, 1, self._last_step):
            self._saver.wait()
        self._raise_failure(must_succeed)

    def before_update(self) -> None:
        """Called before the optimizer's step, which must not overtake a snapshot that is being copied."""
        if self.active:
            self._saver.before_update()

    def finish(self) -> None:
        """Wait until the last save is written, and leave the folder to others."""
        if self.active:
            self._saver.wait()
            self._raise_failure(must_succeed=False)
            self._saver.release()
        self._release()

    @property
    def longest_seconds(self) -> float:
        """Of a save so far, from its begin to its end on disk."""
        return self._saver.longest_seconds if self.active else 0.0

    def _begin(self, state: RunState) -> None:
        """Begin a run without a checkpoint of Octavo's."""
        folder, started = self._hf, time.perf_counter()
        if folder is not None:
            with self._ending():
                self._ranks.all_do(lambda: load_in_run(folder, model_tensors(state.model)))
            log.info("checkpoint: weights from %s (Hugging Face, %.1fs)", folder.path, since(started))
        elif self.active and not self._config.create_seed_checkpoint:
            log.info("checkpoint: none in %s, starting from fresh weights", self._root)

    def _save_hf(self, state: RunState, step: int) -> None:
        started = time.perf_counter()
        assert isinstance(self._root, Path)  # checked with the configuration
        with self._ending():
            tensors = model_tensors(state.model)
            target = save_in_run(self._loaded.config, self._root, step, tensors, self._ranks)
        self._saved_step = step
        log.info("checkpoint: saved %s (Hugging Face, %.1fs)", target, since(started))

    def _raise_failure(self, must_succeed: bool) -> None:
        failure = self._saver.take_failure()
        if failure is None:
            return
        if must_succeed:
            with self._ending():
                raise CheckpointError(failure)
        if self._ranks.is_first:
            log.error("%s\n  training goes on; the next save is tried as usual", failure)

    def _take_folder(self) -> None:
        try:
            self._lock = folders.lock(self._root)
            folders.clean_leftovers(self._root)
        except OSError as error:
            raise CheckpointError(
                f"{self._root} cannot be written to: {error.strerror}\n"
                "  choose another job.dump_folder or checkpoint.folder, or set checkpoint.load_only"
            ) from None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make_room(self, state: RunState) -> None:
        """Before a step is taken: room on the disk, and host memory that is kept for all saves."""
        if not self._saves or not self._config.enable:
            return
        sizes: dict[str, int] = {}
        for known in self._ranks.gather(state.full_sizes()):
            sizes.update(known)
        size = sum(sizes.values()) + MARGIN_BYTES
        with self._ending():
            line = self._ranks.first_does(
                partial(fit.check_space, self._root, size, self._config, self._last_step)
            )
        if line:
            log.warning("%s", line)
        with self._ending():
            self._saver.reserve(state.expected_tensors())

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Give the folder back where an error ends the run; every rank has the same error."""
        try:
            yield
        except (ConfigError, CheckpointError):
            self._release()
            raise


def _worlds(manifest: Manifest, state: RunState) -> tuple[Any, int]:
    return manifest.train_state.get("world_size"), state.world_size
