"""Files and folders of checkpoints: names, durable writes, listing, replacing, pruning. Torch-free.

    {dump_folder}/{checkpoint.folder}/
        .lock                     held by the run that saves here; freed by the kernel when it dies
        step-500/                 a checkpoint; appears by one rename, complete or not at all
        step-1000.tmp-3fa9c1d2/   being written, or left by a run that died
        step-1000.old-3fa9c1d2/   replaced by a new step-1000: put back if that one never came
        step-500.gone-3fa9c1d2/   being deleted

Only these names, and only real folders, are ever looked at: a symlink or any other name is left alone, so
nothing outside is read, replaced or deleted. Order on disk: files, fsync of each, fsync of the folder,
rename, fsync of the parent; so a rename that survives a power cut finds its content there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import NamedTuple

EXIT_CHECKPOINT = 4
"""Exit code where a checkpoint that is needed cannot be used or written."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
"""What a checkpoint may call its files: no separators, no leading dot."""
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_LEFTOVER = re.compile(r"(step-(?:0|[1-9][0-9]{0,17}))\.(tmp|old|gone)-[0-9a-f]{8}")
_LOCK = ".lock"


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message has up to three lines and no traceback is due."""


class StepFolder(NamedTuple):
    """A folder named ``step-N``; whether it holds a valid checkpoint is `integrity`'s to say."""

    step: int
    path: Path


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return root / f"step-{step}"


def step_of(name: str) -> int | None:
    """N of ``step-N``; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def step_folders(root: Path) -> list[StepFolder]:
    """All step folders, the oldest first; symlinks and other names are not among them."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as entries:
        for entry in entries:
            step = step_of(entry.name)
            if step is not None and entry.is_dir(follow_symlinks=False):
                found.append(StepFolder(step, Path(entry.path)))
    return sorted(found)


def read_regular(path: Path) -> bytes:
    """The content of a regular file; a symlink, folder or device is refused.

    Raises:
        CheckpointError: it is missing, cannot be read or is no regular file.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading in binary; the name itself must not be a symlink.

    Raises:
        CheckpointError: it is missing or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: is missing") from None
    except OSError as error:
        what = "is a symlink" if path.is_symlink() else (error.strerror or "cannot be opened")
        raise CheckpointError(f"{path.name}: {what}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path.name}: is not a regular file")
    return FileIO(descriptor, "rb")


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_temporary(root: Path, step: int) -> Path:
    """Create the folder in which the checkpoint of `step` is written."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"step-{step}.tmp-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def publish(temporary: Path, target: Path) -> None:
    """Make a finished temporary folder the checkpoint `target`, in place of one that is there."""
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


def remove(path: Path) -> None:
    """Delete a folder of ours. A symlink is unlinked, never followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def clean_leftovers(root: Path) -> list[str]:
    """Finish what dead runs left: delete halves, put back a checkpoint whose successor never came.

    Returns:
        Names that were dealt with.
    """
    done = []
    if not root.is_dir():
        return []
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


def prune(root: Path, keep: int, protected: int, is_valid: Callable[[Path], bool]) -> list[int]:
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
        # Renamed first: a folder that is half deleted must not look like a checkpoint.
        condemned = folder.path.with_name(f"{folder.path.name}.gone-{secrets.token_hex(4)}")
        os.rename(folder.path, condemned)
        remove(condemned)
    return [folder.step for folder in gone]


def lock(root: Path) -> int | None:
    """Hold the folder for this process until it ends, so that two runs do not save into it.

    Returns:
        A descriptor to keep open; None where the file system has no locks.

    Raises:
        CheckpointError: another run holds it.
    """
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
