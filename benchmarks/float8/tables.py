"""A table as text, Markdown and CSV, and the host's description that goes above it."""

from __future__ import annotations

import csv
import importlib.util
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from trainer import __version__
from trainer.text_table import aligned


@dataclass
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    right: Sequence[int] | None = None
    """Columns that are flush right; all when unset."""

    def text(self) -> str:
        """For the terminal."""
        right = range(len(self.header)) if self.right is None else self.right
        return "\n".join(aligned([self.header, *self.rows], right, indent=""))

    def markdown(self) -> str:
        """As GitHub reads it."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def write_csv(self, path: Path) -> None:
        """Header and rows, its folder included."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([self.header, *self.rows])


def host_lines(device_name: str) -> list[str]:
    """Device, versions, date and command: without them a figure says nothing."""
    packages = [f"octavo {__version__}", f"torch {torch.__version__}", f"python {platform.python_version()}"]
    for name in ("triton", "torchao", "torchtitan"):
        if importlib.util.find_spec(name) is not None:
            packages.append(f"{name} {_version(name)}")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [device_name, ", ".join(packages), date, "command: python " + shlex.join(sys.argv)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(version unknown)"
