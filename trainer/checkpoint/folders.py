"""Folders of checkpoints, on a disk or remote: names, listing, replacing, pruning, locking. Torch-free.

    {dump_folder}/{checkpoint.folder}/
        .lock                     held by the run that saves here; freed by the kernel when it dies
        step-500/                 a checkpoint; appears by one rename, complete or not at all
        step-1000.tmp-3fa9c1d2/   being written, or left by a run that died
        step-1000.old-3fa9c1d2/   replaced by a new step-1000: put back if that one never came
        step-500.gone-3fa9c1d2/   being deleted

Only these names, and only real folders, are ever looked at: a symlink or any other name is left alone, so
nothing outside is read, replaced or deleted. Order on disk: files, fsync of each, fsync of the folder,
rename, fsync of the parent; so a rename that survives a power cut finds its content there.

On remote storage (`trainer.checkpoint.remote`) only step-N is there: it is written in place, and its marker,
written last, takes the part of the rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.files import MARKER_FILE, CheckpointError, sync_folder
from trainer.checkpoint.remote import Place, RemotePath

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_LEFTOVER = re.compile(r"(step-(?:0|[1-9][0-9]{0,17}))\.(tmp|old|gone)-[0-9a-f]{8}")
_LOCK = ".lock"
_PROBE = ".writable"


class StepFolder(NamedTuple):
    """A folder named ``step-N``; whether it holds a valid checkpoint is `integrity`'s to say."""

    step: int
    path: Place


def step_folder(root: Place, step: int) -> Place:
    """Where the checkpoint of `step` lies."""
    return root / f"step-{step}"


def step_of(name: str) -> int | None:
    """N of ``step-N``; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def step_folders(root: Place) -> list[StepFolder]:
    """All step folders, the oldest first; symlinks and other names are not among them.

    Raises:
        OSError: remote storage cannot be reached.
    """
    if isinstance(root, RemotePath):
        names = [(step_of(name), root / name) for name in root.listing()]
        return sorted(StepFolder(step, path) for step, path in names if step is not None)
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        for entry in entries:
            step = step_of(entry.name)
            if step is not None and entry.is_dir(follow_symlinks=False):
                found.append(StepFolder(step, Path(entry.path)))
    return sorted(found)


def new_temporary(root: Place, step: int) -> Place:
    """Make the folder that the checkpoint of `step` is written to; on remote storage, an empty step-N."""
    if isinstance(root, RemotePath):
        remove(root / f"step-{step}")
        return root / f"step-{step}"
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"step-{step}.tmp-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def publish(temporary: Place, target: Place) -> None:
    """Make a finished temporary folder the checkpoint `target`, in place of one that is there."""
    if isinstance(temporary, RemotePath) or isinstance(target, RemotePath):
        return
    replaced = None
    if os.path.lexists(target):
        replaced = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
        os.rename(target, replaced)
    try:
        os.rename(temporary, target)
    except OSError:
        if replaced is not None:
            os.rename(replaced, target)
        raise
    sync_folder(target.parent)
    if replaced is not None:
        remove(replaced)


def remove(path: Place) -> None:
    """Delete a folder of ours. A symlink is unlinked, never followed."""
    if isinstance(path, RemotePath):
        (path / MARKER_FILE).remove()  # first: what is half deleted must not look like a checkpoint
        path.remove()
    elif path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def free_bytes(root: Place) -> int | None:
    """Free space where `root` is or will be; None on remote storage."""
    if isinstance(root, RemotePath):
        return None
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def clean_leftovers(root: Place) -> list[str]:
    """Finish what dead runs left: delete halves, put back a checkpoint whose successor never came.

    Returns:
        Names that were dealt with.
    """
    done: list[str] = []
    if isinstance(root, RemotePath) or not root.is_dir():
        return done
    for name in sorted(os.listdir(root)):
        match = _LEFTOVER.fullmatch(name)
        path = root / name
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        target = root / match.group(1)
        if match.group(2) == "old" and not os.path.lexists(target):
            os.rename(path, target)
            sync_folder(root)
        else:
            remove(path)
        done.append(name)
    return done


def prune(root: Place, keep: int, protected: int, is_valid: Callable[[Place], bool]) -> list[int]:
    """Keep the `keep` newest valid step folders (0: delete nothing).

    Args:
        root: Where they lie.
        keep: How many valid ones stay.
        protected: A step known to be valid: it stays and counts, so at least one valid one always remains.
        is_valid: Whether a folder holds a valid checkpoint.

    Returns:
        The steps that were deleted.
    """
    if keep <= 0:
        return []
    folders, kept = step_folders(root), {protected}
    valid = {folder.step for folder in folders if folder.step != protected and is_valid(folder.path)}
    kept.update(sorted(valid, reverse=True)[: keep - 1])
    # What is not valid stays for a look at it, until it is older than all that is kept.
    gone = [f for f in folders if f.step not in kept and (f.step in valid or f.step < min(kept))]
    for folder in gone:
        if isinstance(folder.path, RemotePath):
            remove(folder.path)
            continue
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        condemned = folder.path.with_name(f"{folder.path.name}.gone-{secrets.token_hex(4)}")
        os.rename(folder.path, condemned)
        remove(condemned)
    return [folder.step for folder in gone]


def lock(root: Place) -> int | None:
    """Hold the folder for this process until it ends, so that two runs do not save into it.

    Returns:
        A descriptor to keep open; None where the storage has no locks.

    Raises:
        CheckpointError: another run holds it.
        OSError: it cannot be written to.
    """
    if isinstance(root, RemotePath):
        (root / _PROBE).write(b"")
        (root / _PROBE).remove()
        return None
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"{root} is in use: another run saves its checkpoints there\n"
            "  a killed launcher can leave workers behind: look for python -m trainer.train\n"
            "  end them, or choose another job.dump_folder"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
