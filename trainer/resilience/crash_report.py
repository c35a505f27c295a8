"""One file that says how a run failed: ``crash_report.json`` in the run folder.

    what       the error in one line                  rank, exit_code, step, phase
    exception  type, message, traceback               memory, log (last lines of that rank), stacks
    versions   of Octavo, torch, Python, platform     config, command_line, restarts_left

It is about the rank that failed first; `others` has a line for each of the rest. The launcher writes it, from
the notes of its workers, so a worker that was killed is in it too; without a launcher the worker writes it.
The report of an earlier failure is kept under the next free number.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.resilience.notes import write_note

REPORT_FILE = "crash_report.json"


def failure_note(
    error: BaseException | None, what: str, *, code: int, step: int | None, phase: str
) -> dict[str, Any]:
    """What a rank knows of its failure."""
    details = None
    if error is not None:
        details = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
    return {
        "kind": "failed",
        "what": what,
        "exit_code": code,
        "step": step,
        "phase": phase,
        "time": _now(),
        "exception": details,
        "memory": _memory(),
        "stacks": None if error is not None else _stacks(),
    }


def leave_failure(rank: int, folder: Path | None, argv: Sequence[str], note: Mapping[str, Any]) -> None:
    """Give the note to the launcher, or write the report where there is none."""
    with suppress(OSError):
        if not write_note(rank, note) and folder is not None:
            write_report(folder, rank, note, argv=argv)


def write_report(
    folder: Path,
    rank: int,
    note: Mapping[str, Any],
    *,
    argv: Sequence[str],
    log_lines: Sequence[str] = (),
    others: Mapping[str, str] | None = None,
    restarts_left: int = 0,
) -> Path | None:
    """Write the report of a failure of `rank`; None where the folder cannot be written to."""
    report = {
        "what": note["what"],
        "rank": rank,
        **{key: value for key, value in note.items() if key not in ("kind", "what")},
        "log": list(log_lines),
        "others": dict(others or {}),
        "restarts_left": restarts_left,
        "versions": _versions(),
        "config": str(folder / "config.toml"),
        "command_line": list(argv),
    }
    path = folder / REPORT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            number = 1
            while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
                number += 1
            path.rename(kept)
        path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    except OSError:
        return None
    return path


def _memory() -> dict[str, float]:
    """GiB of this process: host memory, and the device's where it has one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = {"host_peak_gib": usage.ru_maxrss / 2**20}
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["host_gib"] = pages * resource.getpagesize() / 2**30
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["device_allocated_gib"] = torch.cuda.memory_allocated() / 2**30
        found["device_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return {name: round(value, 3) for name, value in found.items()}


def _stacks() -> dict[str, str]:
    """Where each Python thread is: a failure without an exception is a thread that stands still."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    }


def _versions() -> dict[str, str]:
    return {
        "octavo": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
