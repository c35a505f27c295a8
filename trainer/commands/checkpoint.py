"""`octavo checkpoint list | verify | show | prune FOLDER`: look after checkpoints, without torch.

FOLDER is a run folder, the folder with the step-N folders, or one step-N; each may be a URL.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from trainer.checkpoint import folders
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import EXIT_CHECKPOINT, MARKER_FILE, CheckpointError
from trainer.checkpoint.folders import StepFolder
from trainer.checkpoint.integrity import verify_files
from trainer.checkpoint.manifest import DTYPE_BYTES, FULL, Manifest, open_checkpoint
from trainer.checkpoint.remote import Place, RemotePath, as_place, check_protocol


def list_checkpoints(folder: str) -> int:
    """List the checkpoints with what is in them; contents are not read (`verify` does)."""
    rows = [("step", "content", "ranks", "tokens seen", "size", "saved", "state")]
    for step, path in _steps(folder):
        when = _saved_at(path)
        try:
            records, manifest = open_checkpoint(path)
        except CheckpointError as error:
            rows.append((str(step), "?", "?", "?", "?", when, f"INVALID  {error}"))
            continue
        size = _megabytes(sum(record.size for record in records.values()))
        state = manifest.train_state
        content = "full" if manifest.content == FULL else "model only"
        tokens, ranks = f"{state.get('tokens_seen', 0):,}", str(state.get("world_size", "?"))
        rows.append((str(step), content, ranks, tokens, size, when, "complete"))
    print_table(rows)
    return 0


def verify(folder: str) -> int:
    """Read every file of every checkpoint and compare it with what was written."""
    rows, faults = [("step", "files", "size", "result")], 0
    for step, path in _steps(folder):
        try:
            records, _ = open_checkpoint(path)
            verify_files(path, records)
            size = _megabytes(sum(record.size for record in records.values()))
            rows.append((str(step), str(len(records)), size, "valid"))
        except CheckpointError as error:
            faults += 1
            rows.append((str(step), "?", "?", f"INVALID  {error}"))
    print_table(rows)
    return EXIT_CHECKPOINT if faults else 0


def show(folder: str) -> int:
    """Describe one checkpoint (of several, the newest complete one)."""
    path, manifest = _newest_complete(folder)
    state, tensors = manifest.train_state, manifest.tensors
    lines = [("checkpoint", str(path)), ("step", f"{manifest.step:,}"), ("content", manifest.content)]
    counts = {key: value for key, value in state.items() if type(value) is int and key != "step"}
    lines += [(key.replace("_", " "), f"{value:,}") for key, value in counts.items()]
    lines += _data_lines(manifest.dataloader)
    for kind in ("model", "optimizer", "converter", "rng"):
        entries = manifest.under(kind).values()
        if entries:
            count = sum(math.prod(entry.shape) for entry in entries)
            dtypes = ", ".join(sorted({entry.dtype for entry in entries}, key=lambda d: -DTYPE_BYTES[d]))
            size = _megabytes(sum(entry.nbytes for entry in entries))
            lines.append((kind, f"{len(entries)} tensors, {count:,} elements, {size}, {dtypes}"))
    chunks = sum(len(entry.chunks) for entry in tensors.values())
    lines.append(("stored as", f"{chunks} chunks in {len(_files(manifest))} files"))
    for key in ("model.name", "model.flavor", "optimizer.lr", "training.steps", "training.seq_len"):
        if key in manifest.config:
            lines.append((key, str(manifest.config[key])))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in lines))
    return 0


def prune(folder: str, keep: int, dry_run: bool = False) -> int:
    """Delete all but the newest valid checkpoints; contents are verified before anything is deleted.

    Args:
        folder: Where they lie.
        keep: How many valid ones stay.
        dry_run: Say what would be deleted, and delete nothing.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}; allowed: 1 and more")
    steps = _steps(folder)
    if folders.step_of(_place(folder).name) is not None:
        raise ValueError(f"{folder} is one checkpoint; give the folder that holds it")
    root = steps[0].path.parent
    held = folders.lock(root)  # a run that is alive has it: two that prune would count different ones
    try:
        valid = _valid_newest(steps, keep)
        if not valid:
            raise CheckpointError(f"no checkpoint in {root} is valid: nothing was deleted")
        gone = [step.step for step in steps if step.step < min(valid)]
        if not dry_run:
            gone = folders.prune(
                root, len(valid), max(valid), lambda path: folders.step_of(path.name) in valid
            )
    finally:
        if held is not None:
            os.close(held)
    verb = "would remove" if dry_run else "removed"
    names = ", ".join(f"step-{step}" for step in gone) or "nothing"
    print(f"kept {', '.join(f'step-{step}' for step in sorted(valid))}; {verb} {names}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "list": list_checkpoints,
    "verify": verify,
    "show": show,
    "prune": prune,
}


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 4 where a checkpoint is not valid."""
    import tyro

    from trainer.config.errors import EXIT_BAD_INPUT

    table = {name: _positional(command) for name, command in COMMANDS.items()}
    try:
        return tyro.extras.subcommand_cli_from_dict(table, prog="octavo checkpoint", args=list(argv))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CHECKPOINT
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _positional(command: Callable[..., int]) -> Callable[..., int]:
    """The command with `folder` as a word rather than a flag."""
    import tyro

    command.__annotations__["folder"] = Annotated[str, tyro.conf.Positional]
    return command


def _place(folder: str) -> Place:
    place = as_place(folder)
    if isinstance(place, RemotePath):
        check_protocol(folder)
        return place
    if not place.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return place.resolve()


def _steps(folder: str) -> list[StepFolder]:
    path = _place(folder)
    own = folders.step_of(path.name)
    if own is not None:
        return [StepFolder(own, path)]
    try:
        for place in (path, path / CheckpointConfig().folder):
            if found := folders.step_folders(place):
                return found
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    raise ValueError(f"{folder}: no folder step-N there, nor in its subfolder {CheckpointConfig().folder}")


def _saved_at(folder: Place) -> str:
    try:
        moment = folder.stat().st_mtime if isinstance(folder, Path) else (folder / MARKER_FILE).modified()
    except OSError:
        moment = None
    return "?" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _newest_complete(folder: str) -> tuple[Place, Manifest]:
    for _, path in reversed(_steps(folder)):
        try:
            return path, open_checkpoint(path)[1]
        except CheckpointError as error:
            print(f"warning: skipped {path}: {error}", file=sys.stderr)
    raise CheckpointError(f"{folder}: no complete checkpoint")


def _valid_newest(steps: Sequence[StepFolder], keep: int) -> set[int]:
    valid: set[int] = set()
    for step, path in reversed(steps):
        try:
            records, _ = open_checkpoint(path)
            verify_files(path, records)
            valid.add(step)
        except CheckpointError as error:
            print(f"warning: {path}: {error}", file=sys.stderr)
        if len(valid) == keep:
            break
    return valid


def _data_lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Where each source is; a position that is malformed has no line."""
    lines = [("windows read", f"{data['windows']:,}")] if type(data.get("windows")) is int else []
    sources = data.get("sources")
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict):
            place = ", ".join(f"{key} {source.get(key)}" for key in ("epoch", "document", "offset"))
            lines.append(("data", f"{source.get('dataset')}: {place}"))
    return lines


def _files(manifest: Manifest) -> set[str]:
    return {chunk.file for entry in manifest.tensors.values() for chunk in entry.chunks}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text, the first of them the heading, in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
