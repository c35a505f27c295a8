"""Single files of checkpoints, on a disk or remote: reading regular ones, writing durably. Torch-free.

A symlink, folder or device in the place of a file is refused, so nothing outside a checkpoint is read, and
nothing waits for a pipe.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from trainer.checkpoint.remote import Place, RemotePath

EXIT_CHECKPOINT = 4
"""Exit code where a checkpoint that is needed cannot be used or written."""

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
"""What a checkpoint may call its files: no separators, no leading dot."""
MARKER_FILE = "COMPLETE"
"""What is written last."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message has up to three lines and no traceback is due."""


def check_folder(folder: Place) -> None:
    """Check that a step's folder is one.

    Raises:
        CheckpointError: it is a symlink, or not there.
    """
    if isinstance(folder, Path) and (folder.is_symlink() or not folder.is_dir()):
        raise CheckpointError("is not a folder of its own" if folder.is_symlink() else "does not exist")


def read_regular(path: Place) -> bytes:
    """The content of a regular file; a symlink, folder or device is refused.

    Raises:
        CheckpointError: it is missing, cannot be read or is no regular file.
    """
    try:
        if isinstance(path, RemotePath):
            return path.read()
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None


def open_regular(path: Place) -> BinaryIO:
    """Open a regular file for reading in binary; the name itself must not be a symlink.

    Raises:
        CheckpointError: it is missing or no regular file.
    """
    try:
        if isinstance(path, RemotePath):
            return path.open()
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: is missing") from None
    except OSError as error:
        link = isinstance(path, Path) and path.is_symlink()
        what = "is a symlink" if link else (error.strerror or "cannot be opened")
        raise CheckpointError(f"{path.name}: {what}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path.name}: is not a regular file")
    return cast(BinaryIO, FileIO(descriptor, "rb"))


def file_sizes(folder: Place, names: Iterable[str]) -> dict[str, int]:
    """Bytes of regular files in a folder.

    Raises:
        CheckpointError: one is missing or no regular file.
    """
    sizes = {}
    listed = folder.listing() if isinstance(folder, RemotePath) else {}
    for name in names:
        path = folder / name
        if isinstance(path, RemotePath):
            try:
                known = listed.get(name)
                sizes[name] = path.size() if known is None else known
            except FileNotFoundError:
                raise CheckpointError(f"{name}: is missing") from None
            except OSError as error:
                raise CheckpointError(f"{name}: {error.strerror}") from None
        else:
            with open_regular(path) as file:
                sizes[name] = file.seek(0, 2)
    return sizes


def read_ranges(path: Place, bounds: Sequence[tuple[int, int]]) -> Iterator[bytearray]:
    """The bytes from start to end of a regular file, for each (start, end).

    Raises:
        CheckpointError: the file is missing, no regular one, or too short.
    """
    if isinstance(path, RemotePath):
        for (start, end), part in zip(bounds, _of_remote(path, bounds), strict=True):
            if len(part) != end - start:
                raise CheckpointError(f"{path.name}: ends too early")
            yield bytearray(part)
        return
    with open_regular(path) as file:
        for start, end in bounds:
            content = bytearray(end - start)
            file.seek(start)
            view, filled = memoryview(content), 0
            while filled < len(content):
                count = file.readinto(view[filled:])  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(f"{path.name}: ends too early")
                filled += count
            yield content


def _of_remote(path: RemotePath, bounds: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    try:
        yield from path.ranges(bounds)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None


class NewFile:
    """A file being written; once `close` returns, it is on disk.

    Raises:
        OSError: by each method.
    """

    def __init__(self, path: Place) -> None:
        self._remote = path.create() if isinstance(path, RemotePath) else None
        self._path = path
        if isinstance(path, Path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, block: memoryview) -> None:
        """Append a block."""
        if isinstance(self._path, RemotePath):
            assert self._remote is not None
            with self._path.guarded():
                self._remote.write(block)
            return
        while block:
            block = block[os.write(self._descriptor, block) :]

    def close(self) -> None:
        """Wait until everything is on disk."""
        if isinstance(self._path, RemotePath):
            assert self._remote is not None
            with self._path.guarded():
                self._remote.close()
            return
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def abandon(self) -> None:
        """Give up after an error; what was written has no meaning."""
        with contextlib.suppress(Exception):
            if self._remote is not None:
                getattr(self._remote, "discard", self._remote.close)()
            else:
                os.close(self._descriptor)


@contextlib.contextmanager
def new_file(path: Place) -> Iterator[NewFile]:
    """Write a file durably: it is on disk where the block ends without an error."""
    file = NewFile(path)
    try:
        yield file
    except BaseException:
        file.abandon()
        raise
    file.close()


def write_durably(path: Place, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    if isinstance(path, RemotePath):
        path.write(content)
        return
    with new_file(path) as file:
        file.write(memoryview(content))


def sync_folder(path: Place) -> None:
    """Wait until the names in a folder are on disk."""
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
