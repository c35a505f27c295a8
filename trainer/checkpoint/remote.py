"""Checkpoints on storage that is no local disk: s3://, http:// and what else fsspec opens. Torch-free.

`RemotePath` has the few parts of `pathlib.Path` that checkpoints use (``/``, name, parent), and the few
operations that `trainer.checkpoint.files` builds on. What differs from a local disk:

- A bucket has no rename. A checkpoint is written where it will stay, and its marker, written last, is what
  makes it one: a step-N without marker is no checkpoint. What was at step-N before loses its marker first.
- There are no locks, no fsync and no free space to ask for: a store has an object once it has said so.
- Whatever a backend raises becomes an OSError that names the place.

``file://`` is a plain path. fsspec finds credentials where each backend looks for them (environment, files
below the home folder); those written into a URL are not shown in messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, ENOENT
from pathlib import Path
from typing import Any, BinaryIO

READ_BLOCK_BYTES = 4 * 2**20
_BATCH_BYTES = 128 * 2**20
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@")


def is_url(text: str) -> bool:
    """Whether `text` names remote storage; ``file://`` and plain paths do not."""
    match = _URL.fullmatch(text)
    return match is not None and match.group(1).lower() != "file"


def as_place(text: str) -> Place:
    """The place that a user's text names: a RemotePath for a URL, else a Path."""
    if is_url(text):
        return RemotePath(text.rstrip("/"))
    match = _URL.fullmatch(text)
    return Path(match.group(2) if match else text).expanduser()


def checkpoint_root(dump_folder: str, folder: str) -> Place:
    """Where a run's step-N folders lie: `folder` below `dump_folder`, or at the URL that `folder` is."""
    return as_place(folder) if "://" in folder else Path(dump_folder) / folder


def check_protocol(url: str) -> None:
    """Check that fsspec knows the protocol and finds the package for it.

    Raises:
        ValueError: it does not; the message says which package is missing.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f"{protocol}:// needs a package that is not installed\n  {error}") from None
    except ValueError:
        raise ValueError(
            f"{protocol!r} is not a protocol that fsspec knows\n"
            "  allowed: a folder's name below job.dump_folder, or a URL such as s3://bucket/folder"
        ) from None


@dataclass(frozen=True)
class RemotePath:
    """A place on remote storage."""

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return _CREDENTIALS.sub("", self.url)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that it lies in."""
        return RemotePath(self.url.rpartition("/")[0])

    def listing(self) -> dict[str, int | None]:
        """Names in this folder -> sizes: None for folders, and where the store has none; {} without one."""
        with self._backend() as (fs, path):
            fs.invalidate_cache()
            try:
                entries = fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        found = {}
        for entry in entries:
            is_file = entry.get("type") == "file"
            found[entry["name"].rstrip("/").rpartition("/")[2]] = entry.get("size") if is_file else None
        return found

    def size(self) -> int:
        """Bytes of a file."""
        with self._backend() as (fs, path):
            return int(fs.info(path)["size"])

    def read(self) -> bytes:
        """The content of a file."""
        with self._backend() as (fs, path):
            return fs.cat_file(path)

    def ranges(self, bounds: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Parts of a file, from start to end each, in order; several requests are under way at a time."""
        whole: bytes | None = None
        for batch in _batches(bounds):
            if whole is None:
                with self._backend() as (fs, path):
                    starts, ends = [start for start, _ in batch], [end for _, end in batch]
                    parts = fs.cat_ranges([path] * len(batch), starts, ends, on_error="raise")
                # A server without range requests sends all of it: then once is enough.
                whole = next((p for p, (i, j) in zip(parts, batch, strict=True) if len(p) > j - i), None)
            yield from parts if whole is None else [whole[start:end] for start, end in batch]

    def open(self) -> BinaryIO:
        """Open a file to read it from its beginning on."""
        with self._backend() as (fs, path):
            return fs.open(path, "rb", block_size=READ_BLOCK_BYTES, cache_type="readahead")

    def create(self) -> BinaryIO:
        """Open a new file; it is there once it is closed."""
        with self._backend() as (fs, path):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return fs.open(path, "wb")

    def write(self, content: bytes) -> None:
        """Write a small file."""
        with self._backend() as (fs, path):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            fs.pipe_file(path, content)

    def remove(self) -> None:
        """Delete a file, or a folder and all that is in it; nothing may be there."""
        with self._backend() as (fs, path):
            fs.invalidate_cache()
            if fs.exists(path):
                fs.rm(path, recursive=True)

    def modified(self) -> float | None:
        """When a file was written, in seconds since 1970, where the store knows."""
        with self._backend() as (fs, path):
            try:
                return fs.modified(path).timestamp()
            except NotImplementedError:
                return None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what a backend raises into an OSError about this place."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(ENOENT, "No such file", str(self)) from None
        except OSError as error:
            if error.strerror:
                raise
            raise OSError(EIO, _CREDENTIALS.sub("", str(error)) or type(error).__name__, str(self)) from None
        except Exception as error:  # every backend has errors of its own
            message = _CREDENTIALS.sub("", " ".join(str(error).split())[:200])
            raise OSError(EIO, f"{type(error).__name__} {message}".strip(), str(self)) from None

    @contextmanager
    def _backend(self) -> Iterator[tuple[Any, str]]:
        import fsspec

        with self.guarded():
            fs, path = fsspec.core.url_to_fs(self.url)
            yield fs, path


def _batches(bounds: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The first alone, then as many at a time as fit `_BATCH_BYTES`."""
    batch: list[tuple[int, int]] = []
    for index, (start, end) in enumerate(bounds):
        size = sum(j - i for i, j in batch)
        if batch and (index == 1 or size + end - start > _BATCH_BYTES):
            yield batch
            batch = []
        batch.append((start, end))
    if batch:
        yield batch


Place = Path | RemotePath
"""A folder or file of checkpoints."""
