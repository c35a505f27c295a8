"""`octavo eval CHECKPOINT`: perplexity on any source, or tasks of lm-eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro

from trainer.commands.shared import Device, Dtype, at_least, open_model, run_command, warn_beyond

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer
    from trainer.interop.trained import LoadedModel, TrainedModel

DEFAULT_SEQ_LEN = 2048


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return run_command(evaluate, "eval", argv)


def evaluate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    dataset: str | None = None,
    dataset_path: str | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    steps: int = -1,
    tasks: tuple[str, ...] = (),
    task_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Perplexity of a trained model on any source; with tasks, their scores by lm-eval.

    Args:
        checkpoint: A run folder, a step-N folder or a Hugging Face folder.
        dataset: Row of the DATASETS table; without it, the run's validation data.
        dataset_path: Local file, folder or glob.
        seq_len: Tokens in a window; without it, the run's.
        batch_size: Windows that are computed together; without it, the run's, or 8.
        steps: Batches to read; -1 reads all.
        tasks: Names of lm-eval tasks (extra eval); no perplexity is computed then.
        task_path: Folder with your own task files (.yaml) for lm-eval.
        num_fewshot: Examples in each task's context.
        limit: Documents of each task.
        step: Step of a run; the newest valid one without it.
        tokenizer: The model's tokenizer, where it is not where the run had it.
        dtype: Of the weights in memory; auto is what the run computed in, else float32 on a CPU and
            bfloat16 on a GPU.
        device: auto takes the first GPU where there is one.
        as_json: Print one JSON object.
    """
    from trainer.interop.trained import load_on

    at_least("batch_size", 1 if batch_size is None else batch_size)
    at_least("seq_len", 1 if seq_len is None else seq_len)
    idle = {"dataset": dataset, "dataset_path": dataset_path, "steps": None if steps == -1 else steps}
    if not tasks:
        idle = {"task_path": task_path, "num_fewshot": num_fewshot, "limit": limit}
    if given := [name for name, value in idle.items() if value is not None]:
        raise ValueError(f"{given[0]} has no effect {'with' if tasks else 'without'} tasks")
    if steps == 0 or steps < -1:
        raise ValueError(f"steps = {steps}; allowed: -1 (all batches) or 1 and more")
    trained, words = open_model(checkpoint, step, tokenizer)
    if dtype == "auto" and trained.settings.get("training.mixed_precision_param") in get_args(Dtype):
        dtype = trained.settings["training.mixed_precision_param"]
    made_for = trained.config.max_seq_len
    validated = trained.settings.get("validation.enable") is True
    seq_len = seq_len or min(
        made_for, _setting(trained, "seq_len", made_for) if validated else DEFAULT_SEQ_LEN
    )
    batch_size = batch_size or _setting(trained, "local_batch_size", 8)
    warn_beyond(trained, seq_len, "windows")
    loaded = load_on(trained, dtype, device, max_seq_len=seq_len, most_devices=1)
    if tasks:
        from trainer.interop.lm_harness import run_tasks

        scores, table = run_tasks(
            loaded,
            words,
            list(tasks),
            task_path=task_path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            max_length=seq_len,
        )
        print(json.dumps(scores) if as_json else table)
        return
    if dataset is None and dataset_path is None:
        dataset = _setting(trained, "dataset", "python_sources_validation")
        dataset_path = _setting(trained, "dataset_path", None)
    source = (dataset or "text_files", dataset_path)
    _print_perplexity(loaded, words, source, seq_len, batch_size, steps, as_json)


def _print_perplexity(
    loaded: LoadedModel,
    words: Tokenizer,
    source: tuple[str, str | None],
    seq_len: int,
    batch_size: int,
    steps: int,
    as_json: bool,
) -> None:
    """Evaluate on `source`, a dataset and its path."""
    from trainer.data.loader import build_dataloader
    from trainer.interop.evaluation import perplexity

    dataset, path = source
    data = build_dataloader(
        dataset=dataset,
        dataset_path=path,
        tokenizer=words,
        seq_len=seq_len,
        local_batch_size=batch_size,
        infinite=False,
    )
    try:
        result = perplexity(loaded, data, words, limit=steps)
    finally:
        data.close()
    values = {"loss": result.loss, "ppl": result.ppl, "bits_per_byte": result.bits_per_byte}
    if as_json:
        counts = {"tokens": result.tokens, "bytes": result.bytes, "batches": result.batches}
        print(json.dumps({**values, **counts, "dataset": dataset, "seq_len": seq_len}))
        return
    numbers = "  ".join(f"{name}: {value:.5f}" for name, value in values.items())
    print(
        f"{numbers}  ({result.tokens:,} tokens, {result.bytes:,} bytes of {path or dataset} "
        f"in windows of {seq_len}; {loaded.where})"
    )


def _setting(trained: TrainedModel, name: str, default: Any) -> Any:
    """What the run validated with; `default` for a model that comes without its run."""
    found = trained.settings.get(f"validation.{name}")
    kind = str if default is None else type(default)
    return found if isinstance(found, kind) and found else default
