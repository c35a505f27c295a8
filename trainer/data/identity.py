"""What data a run reads, in a few bytes: kept in the checkpoint, so that changed files are noticed.

A file's mark is the SHA-256 of its size and content. Up to `HASHED_BYTES` are read in all; of more than
that, equal samples of every file: its size and evenly spaced stretches of its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.paths import unreadable

HASHED_BYTES = 1 << 26
_STRETCH = 4096
_NAMED_FILES = 64
_UNREADABLE = "cannot be read"


def identify_files(files: Sequence[Path], skip_unreadable: bool = False) -> dict[str, Any]:
    """The mark of a list of files, and of each where they are not too many.

    Raises:
        ValueError: One cannot be read, and is not to be skipped.
    """
    if not files:
        return {}
    root = Path(files[0]).parent if len(files) == 1 else _common_folder(files)
    sizes = [file.stat().st_size for file in files]
    share = None if sum(sizes) <= HASHED_BYTES else max(_STRETCH, HASHED_BYTES // len(files))
    marks = {}
    for file, size in zip(files, sizes, strict=True):
        try:
            mark = _mark(file, size, share)
        except OSError as error:
            if not skip_unreadable:
                raise unreadable(file, error) from error
            mark = _UNREADABLE
        marks[file.relative_to(root).as_posix()] = mark
    whole = hashlib.sha256(repr(sorted(marks.items())).encode()).hexdigest()[:32]
    found: dict[str, Any] = {"files": len(marks), "bytes": sum(sizes), "mark": whole}
    if len(marks) <= _NAMED_FILES:
        found["marks"] = marks
    return found


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In words, what differs between two marks; None where nothing does."""
    if before == now:
        return None
    old, new = before.get("marks"), now.get("marks")
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            if name not in new:
                return f"{name} is gone"
            if name not in old:
                return f"{name} was not there"
            if old[name] != new[name]:
                return f"{name} has another content"
    facts = [f"{key} {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if key != "marks"]
    return ", ".join(facts)


def _common_folder(files: Sequence[Path]) -> Path:
    parts = [file.parent.parts for file in files]
    shared = 0
    while all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return Path(*parts[0][:shared])


def _mark(file: Path, size: int, share: int | None) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        if share is None or size <= share:
            while chunk := data.read(1 << 20):
                digest.update(chunk)
        else:
            stretches = max(1, share // _STRETCH)
            for number in range(stretches):
                data.seek(number * (size - _STRETCH) // max(1, stretches - 1))
                digest.update(data.read(_STRETCH))
    return digest.hexdigest()[:32]
