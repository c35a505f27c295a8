"""Which checkpoint a run starts from.

    in the run's own folder   checkpoint.load_step, or the newest one that is valid
    else                      checkpoint.initial_load_path: a checkpoint, or a folder with some
                              (with initial_load_in_hf that is a Hugging Face folder: `trainer.interop`'s)
    else                      nothing: fresh weights

Newest first, each candidate is checked whole: marker, sizes, manifest, and the checksums of all files, whose
reading the ranks share. One that fails is skipped with a line that names the file. Where steps are there but
none can be used, the run ends: it must not quietly begin anew. So it does for a step that was asked for by
its number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.folders import step_folder, step_folders, step_of
from trainer.checkpoint.integrity import read_records, verify_files
from trainer.checkpoint.manifest import FULL, Manifest, open_checkpoint
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.remote import Place, as_place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint that was checked and is to be loaded."""

    folder: Place
    manifest: Manifest
    is_own: bool
    """From the run's own folder: the run goes on. Otherwise it starts from foreign weights."""


def choose(config: CheckpointConfig, root: Place, ranks: Ranks) -> Found | None:
    """See the module; all ranks call it and get the same.

    Raises:
        CheckpointError: what was asked for is not there or not valid, or nothing of what is there is.
    """
    steps = ranks.first_does(lambda: [folder.step for folder in step_folders(root)])
    if config.load_step >= 0 and (steps or not config.initial_load_path):
        folder = step_folder(root, config.load_step)
        if config.load_step not in steps:
            there = f"it has steps {_listed(steps)}" if steps else "it has none"
            raise CheckpointError(
                f"checkpoint.load_step = {config.load_step}: no {folder.name} in {root}\n  {there}"
            )
        found = Found(folder, _checked(folder, ranks, _resumable), is_own=True)
        if config.load_step < steps[-1]:
            log.warning(
                "steps after %d stay in %s: the newest is taken without load_step", config.load_step, root
            )
        return found
    if steps:
        return Found(*_newest(root, steps, ranks, _resumable), is_own=True)
    if config.initial_load_path and not config.initial_load_in_hf:
        return _initial(as_place(config.initial_load_path), config, ranks)
    return None


def _initial(path: Place, config: CheckpointConfig, ranks: Ranks) -> Found:
    check = _any_content if config.initial_load_model_only else _resumable
    # The user may name a symlink; only what is found inside a folder must not be one.
    real = path.resolve() if isinstance(path, Path) else path
    if step_of(real.name) is not None:
        return Found(real, _checked(real, ranks, check), is_own=False)
    steps = ranks.first_does(lambda: [folder.step for folder in step_folders(real)])
    if not steps:
        raise CheckpointError(
            f"checkpoint.initial_load_path = {str(path)!r}: no checkpoint is there\n"
            "  give a folder named step-N, or one that holds such folders"
        )
    return Found(*_newest(real, steps, ranks, check), is_own=False)


def _newest(
    root: Place, steps: list[int], ranks: Ranks, check: Callable[[Manifest], None]
) -> tuple[Place, Manifest]:
    last = ""
    for step in reversed(steps):
        folder = step_folder(root, step)
        try:
            return folder, _checked(folder, ranks, check)
        except CheckpointError as error:
            last = str(error)
            log.warning("skipped %s", last)
    raise CheckpointError(
        f"no checkpoint in {root} can be used, {len(steps)} were tried; the last: {last}\n"
        "  octavo checkpoint verify says more; to start anew, choose another job.dump_folder"
    )


def _checked(folder: Place, ranks: Ranks, check: Callable[[Manifest], None]) -> Manifest:
    try:
        records, manifest = ranks.first_does(partial(open_checkpoint, folder))
        check(manifest)
        shares = sorted(records)[ranks.rank :: ranks.size]
        ranks.all_do(lambda: verify_files(folder, records, shares))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return manifest


def _resumable(manifest: Manifest) -> None:
    # Step 0 is a seed checkpoint: initial weights, before there is any other state.
    if manifest.content != FULL and manifest.step > 0:
        raise CheckpointError("holds the model only; checkpoint.initial_load_path starts a run from it")


def _any_content(manifest: Manifest) -> None:
    pass


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps[-8:]]
    return ("..., " if len(steps) > 8 else "") + ", ".join(shown)


def is_complete(folder: Place) -> bool:
    """Whether a folder holds a checkpoint whose marker, names and sizes are right."""
    try:
        read_records(folder)
    except CheckpointError:
        return False
    return True
