"""What workers leave for their launcher: how they ended, and their last words. Torch-free.

The launcher makes a folder for the run in the machine's temporary space and names it in the environment.
Each worker keeps there

    rank-3.json   how it ended, where it had something to say: stopped with an exit code, or failed and why
    rank-3.log    its last log lines
    rank-3.place  step and phase that it is in, rewritten each second

so that the launcher can tell what a worker did that was killed and could say nothing itself.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

NOTES_VARIABLE = "OCTAVO_NOTES"
"""Environment variable with the folder."""
STARTED_VARIABLE = "OCTAVO_STARTED"
"""Environment variable with the launcher's start, in seconds since the epoch."""
LOG_LINES = 60
_LOG_BYTES = 64 * 1024


def notes_folder() -> Path | None:
    """The folder, in a process that a launcher started."""
    name = os.environ.get(NOTES_VARIABLE)
    return Path(name) if name and Path(name).is_dir() else None


def write_note(rank: int, note: Mapping[str, Any]) -> bool:
    """Leave a note on how this rank ended; False where there is no launcher to read it."""
    folder = notes_folder()
    if folder is None:
        return False
    temporary = folder / f"rank-{rank}.tmp"
    temporary.write_text(json.dumps(note, default=str))
    temporary.replace(folder / f"rank-{rank}.json")
    return True


def write_place(rank: int, place: str) -> None:
    """Keep where this rank is."""
    if folder := notes_folder():
        with suppress(OSError):
            (folder / f"rank-{rank}.place").write_text(place)


def keep_log(rank: int) -> None:
    """Copy this rank's log to the folder, the last part of it."""
    if folder := notes_folder():
        handler = logging.handlers.RotatingFileHandler(
            folder / f"rank-{rank}.log", maxBytes=_LOG_BYTES, backupCount=1
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)


def read_notes(folder: Path) -> dict[int, dict[str, Any]]:
    """Rank -> its note."""
    found: dict[int, dict[str, Any]] = {}
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError):
            found[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())
    return found


def read_place(folder: Path, rank: int) -> str:
    """Where a rank was last."""
    with suppress(OSError):
        return (folder / f"rank-{rank}.place").read_text()
    return "unknown: it had not begun to train"


def last_log_lines(folder: Path, rank: int) -> list[str]:
    """The end of a rank's log."""
    lines: list[str] = []
    for name in (f"rank-{rank}.log.1", f"rank-{rank}.log"):
        with suppress(OSError):
            lines += (folder / name).read_text(errors="replace").splitlines()
    return lines[-LOG_LINES:]


def clear(folder: Path) -> None:
    """Forget a former attempt."""
    for path in folder.glob("rank-*"):
        with suppress(OSError):
            path.unlink()
