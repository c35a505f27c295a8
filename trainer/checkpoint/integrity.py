"""What makes a checkpoint valid: sizes and checksums of its files, and a marker written last. Torch-free.

    manifest.json          what is in the checkpoint (`trainer.checkpoint.manifest`)
    rank-00000.safetensors ...      the tensors, one file a rank
    integrity.json         size and CRC-32 of every file above
    COMPLETE               BLAKE2b digest of integrity.json

A bit that flips in any of them is seen: in a data file by its CRC-32 (which finds every error of up to 32
neighbouring bits, and misses other ones once in 2^32), in integrity.json by the digest, in COMPLETE by its
own mismatch. This is protection against broken disks and killed writers, not against forgery: whoever can
write the folder can write matching checksums. A forged checkpoint can hold wrong numbers; it cannot run
code, since nothing in it is code (`manifest`, and safetensors).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import FILE_NAME, CheckpointError, open_regular, read_regular, write_durably

INTEGRITY_FILE = "integrity.json"
MARKER_FILE = "COMPLETE"
BLOCK_BYTES = 4 * 2**20
_FORMAT = "octavo-integrity"


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    crc32: int


def parse_json(name: str, content: bytes) -> dict[str, Any]:
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


def seal(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write integrity.json, then the marker."""
    files = {name: {"size": r.size, "crc32": f"{r.crc32:08x}"} for name, r in sorted(records.items())}
    content = json.dumps({"format": _FORMAT, "version": 1, "files": files}, indent=1).encode() + b"\n"
    write_durably(folder / INTEGRITY_FILE, content)
    write_durably(folder / MARKER_FILE, _digest(content))


def read_records(folder: Path) -> dict[str, FileRecord]:
    """The records of a complete checkpoint; sizes and names are checked, contents are not read.

    Raises:
        CheckpointError: the checkpoint is not complete, or a file has another size or is no regular file.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError("is not a folder of its own" if folder.is_symlink() else "does not exist")
    marker = read_regular(folder / MARKER_FILE)
    content = read_regular(folder / INTEGRITY_FILE)
    if marker != _digest(content):
        raise CheckpointError(f"{INTEGRITY_FILE}: does not match {MARKER_FILE}")
    parsed = parse_json(INTEGRITY_FILE, content)
    files = parsed.get("files")
    if parsed.get("format") != _FORMAT or not isinstance(files, dict):
        raise CheckpointError(f"{INTEGRITY_FILE}: is of another format")
    records = {name: _record(name, entry) for name, entry in files.items()}
    for name, record in records.items():
        with open_regular(folder / name) as file:
            size = file.seek(0, 2)
        if size != record.size:
            raise CheckpointError(f"{name}: has {size:,} bytes, {record.size:,} were written")
    return records


def verify_files(folder: Path, records: Mapping[str, FileRecord], names: Iterable[str] | None = None) -> None:
    """Read files (all, or those of `names`) and compare their checksums.

    Raises:
        CheckpointError: one differs; the message begins with its name.
    """
    for name in records if names is None else names:
        crc = 0
        buffer = bytearray(BLOCK_BYTES)
        view = memoryview(buffer)
        try:
            with open_regular(folder / name) as file:
                while count := file.readinto(buffer):
                    crc = zlib.crc32(view[:count], crc)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from None
        if crc != records[name].crc32:
            raise CheckpointError(f"{name}: its checksum differs, the content changed since it was written")


def verify(folder: Path) -> dict[str, FileRecord]:
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
        size, crc = entry["size"], int(entry["crc32"], 16)
        if type(size) is not int or size < 0:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{INTEGRITY_FILE}: the entry of {name!r} is malformed") from None
    return FileRecord(size, crc)
