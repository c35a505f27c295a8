"""`octavo export RUN --out DIR`: write a trained model as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trainer.commands.shared import run_command


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return run_command(export, "export", argv)


def export(
    checkpoint: Annotated[str, tyro.conf.Positional],
    out: str,
    format: Literal["hf"] = "hf",
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored",
    step: int | None = None,
    tokenizer: str | None = None,
    max_file_gb: float = 5.0,
) -> None:
    """Write a trained model as a folder that transformers, vLLM and lm-eval load.

    Args:
        checkpoint: A run folder, a step-N folder or a Hugging Face folder.
        out: Folder to make; if it is there it must be empty.
        format: hf: safetensors with an index, config.json, generation_config.json, tokenizer files.
        dtype: Dtype of the weights; "stored" keeps what the checkpoint has.
        step: Step of a run; the newest valid one without it.
        tokenizer: The model's tokenizer, where it is not where the run had it.
        max_file_gb: A file of weights ends before the tensor that would make it larger (10^9 bytes).
    """
    from trainer.interop.export import export_hf
    from trainer.interop.trained import open_trained

    if not max_file_gb > 0:
        raise ValueError(f"max_file_gb = {max_file_gb}; allowed: above 0")
    trained = open_trained(checkpoint, step)
    folder = Path(out).expanduser()
    size = export_hf(
        trained,
        folder,
        None if dtype == "stored" else dtype,
        tokenizer,
        largest_file_bytes=int(max_file_gb * 1e9),
    )
    count = len(list(folder.glob("*.safetensors")))
    files = f"{count} file{'s' if count > 1 else ''}"
    print(f"export: {trained.path} -> {folder} ({size / 1e6:,.1f} MB of weights in {files})")
    if not any(folder.glob("tokenizer*")):
        print("export: without a tokenizer: the model has none")
