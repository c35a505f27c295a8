"""What makes a checkpoint valid: sizes and checksums of its files, and a marker written last. Torch-free.

    manifest.json          what is in the checkpoint (`trainer.checkpoint.manifest`)
    rank-00000.safetensors ...      the tensors, one file a rank
    integrity.json         size and XXH3 checksum (64 bits) of every file above
    COMPLETE               BLAKE2b digest of integrity.json

A bit that flips in any of them is seen: in a data file by its checksum (other errors are missed once in
2^64), in integrity.json by the digest, in COMPLETE by its own mismatch. XXH3 reads several times faster than
a disk writes (docs/checkpointing.md has the figures). This is protection against broken disks and killed
writers, not against forgery: whoever can write the folder can write matching checksums. A forged checkpoint
can hold wrong numbers; it cannot run code, since nothing in it is code (`manifest`, and safetensors).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import xxhash

from trainer.checkpoint.files import (
    FILE_NAME,
    MARKER_FILE,
    CheckpointError,
    check_folder,
    file_sizes,
    open_regular,
    read_regular,
    write_durably,
)
from trainer.checkpoint.remote import Place, RemotePath

INTEGRITY_FILE = "integrity.json"
BLOCK_BYTES = 4 * 2**20
_FORMAT = "octavo-integrity"
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    checksum: str
    """16 hexadecimal digits."""


def new_checksum() -> xxhash.xxh3_64:
    """What computes a file's checksum: ``update(block)``, then ``hexdigest()``; frees Python's lock."""
    return xxhash.xxh3_64()


def record_of(content: bytes) -> FileRecord:
    """The record of a small file."""
    return FileRecord(len(content), xxhash.xxh3_64_hexdigest(content))


def parse_json(name: str, content: bytes | bytearray) -> dict[str, Any]:
    """An object from JSON that may come from anywhere.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: is not JSON") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name}: is not a JSON object")
    return parsed


def seal(folder: Place, records: Mapping[str, FileRecord]) -> None:
    """Write integrity.json, then the marker."""
    files = {name: {"size": r.size, "xxh3_64": r.checksum} for name, r in sorted(records.items())}
    content = json.dumps({"format": _FORMAT, "version": 2, "files": files}, indent=1).encode() + b"\n"
    write_durably(folder / INTEGRITY_FILE, content)
    write_durably(folder / MARKER_FILE, _digest(content))


def read_records(folder: Place) -> dict[str, FileRecord]:
    """The records of a complete checkpoint; sizes and names are checked, contents are not read.

    Raises:
        CheckpointError: the checkpoint is not complete, or a file has another size or is no regular file.
    """
    check_folder(folder)
    marker = read_regular(folder / MARKER_FILE)
    content = read_regular(folder / INTEGRITY_FILE)
    if marker != _digest(content):
        raise CheckpointError(f"{INTEGRITY_FILE}: does not match {MARKER_FILE}")
    parsed = parse_json(INTEGRITY_FILE, content)
    files = parsed.get("files")
    if (parsed.get("format"), parsed.get("version")) != (_FORMAT, 2) or not isinstance(files, dict):
        raise CheckpointError(f"{INTEGRITY_FILE}: is of another format")
    records = {name: _record(name, entry) for name, entry in files.items()}
    for name, size in file_sizes(folder, records).items():
        if size != records[name].size:
            raise CheckpointError(f"{name}: has {size:,} bytes, {records[name].size:,} were written")
    return records


def verify_files(
    folder: Place, records: Mapping[str, FileRecord], names: Iterable[str] | None = None
) -> None:
    """Read files (all, or those of `names`) and compare their checksums.

    Raises:
        CheckpointError: one differs; the message begins with its name.
    """
    for name in records if names is None else names:
        checksum = new_checksum()
        buffer = bytearray(BLOCK_BYTES)
        view = memoryview(buffer)
        path = folder / name
        guard = path.guarded() if isinstance(path, RemotePath) else nullcontext()
        try:
            with guard, open_regular(path) as file:
                while count := file.readinto(buffer):  # type: ignore[attr-defined]
                    checksum.update(view[:count])
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from None
        if checksum.hexdigest() != records[name].checksum:
            raise CheckpointError(f"{name}: its checksum differs, the content changed since it was written")


def verify(folder: Place) -> dict[str, FileRecord]:
    """Check everything.

    Raises:
        CheckpointError: the checkpoint is not valid; the message begins with the file that is at fault.
    """
    records = read_records(folder)
    verify_files(folder, records)
    return records


def _digest(content: bytes) -> bytes:
    return b"blake2b " + hashlib.blake2b(content, digest_size=16).hexdigest().encode() + b"\n"


def _record(name: Any, entry: Any) -> FileRecord:
    try:
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{INTEGRITY_FILE}: {str(name)[:60]!r} is not a name that a checkpoint has")
        size, checksum = entry["size"], entry["xxh3_64"]
        if type(size) is not int or size < 0 or not _CHECKSUM.fullmatch(checksum):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{INTEGRITY_FILE}: the entry of {name!r} is malformed") from None
    return FileRecord(size, checksum)
