"""`octavo import HF_DIR --out CHECKPOINT`: turn a Hugging Face folder into a checkpoint to train from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from trainer.commands.shared import run_command


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return run_command(import_hf, "import", argv)


def import_hf(
    folder: Annotated[str, tyro.conf.Positional],
    out: str,
    flavor: str | None = None,
) -> None:
    """Turn a Hugging Face folder of a Llama model into a checkpoint, step-0 of a folder.

    Args:
        folder: With config.json and safetensors files. Nothing in it is executed.
        out: Folder of checkpoints to write step-0 into.
        flavor: Refuse a model of any other flavor.
    """
    from trainer.interop.export import import_hf as run

    source = Path(folder).expanduser()
    if not source.is_dir():
        raise ValueError(f"{folder}: no such folder")
    target, settings = run(source, Path(out).expanduser(), flavor)
    print(f"import: {source} -> {target}")
    print("import: a run starts from it with these settings:\n")
    for line in toml_lines({**settings, "checkpoint.enable": True, "checkpoint.initial_load_path": out}):
        print(f"  {line}")


def toml_lines(settings: dict[str, Any]) -> list[str]:
    """Flat settings as a TOML file writes them."""
    lines: list[str] = []
    section = ""
    for key, value in settings.items():
        where, _, name = key.rpartition(".")
        if where != section:
            lines.append(f"[{where}]")
            section = where
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return lines
