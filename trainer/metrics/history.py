"""Reads ``metrics.jsonl`` back as curves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.metrics.sinks import METRICS_FILE


@dataclass(frozen=True)
class RunHistory:
    """The rows of a run, in the order of their steps and one a step."""

    name: str
    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the step lines."""
    validation_rows: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key, without the steps where it is unknown."""
        rows = self.validation_rows if key == "validation_loss" else self.rows
        known = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
        return [step for step, _ in known], [value for _, value in known]


def read_history(run: Path) -> RunHistory:
    """The metrics of a run folder, or of a metrics file.

    A run that went back to an earlier checkpoint logged some steps twice; the later row counts, and rows
    that it went back behind are dropped. A last line without its end, of a run that is still writing or
    was killed, is left out.

    Raises:
        ValueError: The folder or file is missing, holds no row, or a line is not a metrics object.
    """
    path = run / METRICS_FILE if run.is_dir() else run
    if not run.exists():
        raise ValueError(f"{run}: no such run folder or metrics file")
    if not path.is_file():
        raise ValueError(f"{run}: no {METRICS_FILE} in this folder; is it the run's job.dump_folder?")
    rows: dict[int, dict[str, Any]] = {}
    validation_rows: dict[int, dict[str, Any]] = {}
    last_step = 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(True), 1):
        row = _parse(path, number, line)
        if row is None:
            continue
        step = row["step"]
        if step < last_step:
            rows = {key: value for key, value in rows.items() if key < step}
            validation_rows = {key: value for key, value in validation_rows.items() if key < step}
        last_step = step
        kept = validation_rows if "validation_loss" in row else rows
        kept[step] = {**kept.get(step, {}), **row}  # converters write rows of their own for a logged step
    if not rows and not validation_rows:
        raise ValueError(f"{path}: no metrics in this file yet")
    name = path.parent.resolve().name if path.name == METRICS_FILE else path.stem
    return RunHistory(name, path, list(rows.values()), list(validation_rows.values()))


def _parse(path: Path, number: int, line: str) -> dict[str, Any] | None:
    if not line.endswith("\n") or not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error.msg}), got {line.strip()[:60]!r}") from error
    if isinstance(row, dict) and "torn_line" in row:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f'{path}:{number}: not a metrics object with a "step", got {line.strip()[:60]!r}')
    for key, value in row.items():
        if not _is_number(value):
            raise ValueError(f"{path}:{number}: {key} is {value!r}, not a number")
    return row


def _is_number(value: Any) -> bool:
    if value is None or isinstance(value, (int, float)):
        return True
    return isinstance(value, str) and value in ("nan", "inf", "-inf")
