"""Where scalars go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases on request.

A sink takes ``log(step, scalars)`` and ``close()``. Scalars are named by the keys of ``metrics.jsonl``;
TensorBoard and W&B know them by the tags of `TAGS`. A value of None is unknown (mfu on an unknown device):
null in the file, absent elsewhere.

Nothing on disk is lost. A fresh start in a folder that holds a former run's ``metrics.jsonl`` renames that
to ``metrics-1.jsonl`` (``-2``, ...), and likewise its TensorBoard folder. A resumed run appends; where it
went back to an earlier checkpoint, rows of the same step repeat and the later one counts.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.metrics.config import MetricsConfig

logger = logging.getLogger(__name__)

Scalars = Mapping[str, "float | int | None"]

METRICS_FILE = "metrics.jsonl"

# Key of metrics.jsonl -> tag in TensorBoard and W&B. Dashboards rely on these tags.
TAGS: dict[str, str] = {
    "loss": "loss_metrics/global_avg_loss",
    "max_loss": "loss_metrics/global_max_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "tokens": "n_tokens_seen",
    "tps": "throughput(tps)",
    "tflops": "tflops",
    "mfu": "mfu(%)",
    "time_end_to_end": "time_metrics/end_to_end(s)",
    "time_data_loading": "time_metrics/data_loading(s)",
    "time_data_loading_percent": "time_metrics/data_loading(%)",
    "memory_active_gib": "memory/max_active(GiB)",
    "memory_active_percent": "memory/max_active(%)",
    "memory_gib": "memory/max_reserved(GiB)",
    "memory_percent": "memory/max_reserved(%)",
    "memory_alloc_retries": "memory/num_alloc_retries",
    "memory_ooms": "memory/num_ooms",
    "validation_loss": "validation_metrics/loss",
}
# Times outside tps, since the last line: in the file only.
FILE_ONLY = ("time_compile", "time_validation", "time_checkpoint")


class Sink(Protocol):
    """A place that scalars are written to."""

    def log(self, step: int, scalars: Scalars) -> None:
        """Write the scalars of one step."""

    def close(self) -> None:
        """Write out what is pending; nothing is logged afterwards."""


def _tagged(scalars: Scalars) -> dict[str, float]:
    """Scalars by tag, without the unknown and those that belong in the file only."""
    return {
        TAGS.get(key, key): float(value)
        for key, value in scalars.items()
        if value is not None and key not in FILE_ONLY
    }


def _move_aside(path: Path) -> Path:
    """Rename ``name.ext`` to the first free ``name-1.ext``, ``name-2.ext``, ... and return that."""
    number = 1
    while (target := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
    return target


class JsonlSink:
    """``metrics.jsonl``: one JSON object a line, on disk as soon as it is logged.

    NaN and the infinities, which JSON lacks, are the strings "nan", "inf" and "-inf"; Python's `float`
    reads them.

    Args:
        folder: The run folder; made if absent.
        resume_step: The step that the run resumes after, or None for a fresh start.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        if self.path.exists():
            if resume_step is None:
                former = _move_aside(self.path)
                logger.info("%s holds a former run's metrics: moved to %s", folder, former.name)
            else:
                self._mend_last_line()
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, scalars: Scalars) -> None:
        """Append one object."""
        row: dict[str, Any] = {"step": step}
        for key, value in scalars.items():
            row[key] = str(float(value)) if value is not None and not math.isfinite(value) else value
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _mend_last_line(self) -> None:
        """Keep a line that a killed run left half written as ``{"torn_line": ...}``, so the file parses."""
        with self.path.open("rb+") as file:
            content = file.read()
            start = content.rfind(b"\n") + 1
            torn = content[start:].decode("utf-8", errors="replace")
            if not torn:
                return
            try:
                json.loads(torn)
            except json.JSONDecodeError:
                file.seek(start)
                file.truncate()
                torn = json.dumps({"torn_line": torn})
                file.write(torn.encode())
            file.write(b"\n")


class TensorBoardSink:
    """TensorBoard events under the tags of `TAGS`.

    Args:
        folder: Folder of this run's events.
        resume_step: The step that the run resumes after, or None for a fresh start. TensorBoard hides
            what a former process logged after it.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if resume_step is None and folder.is_dir() and any(folder.iterdir()):
            former = _move_aside(folder)
            logger.info("%s holds a former run's events: moved to %s", folder, former.name)
        self.folder = folder
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, max_queue=1000)

    def log(self, step: int, scalars: Scalars) -> None:
        """Add one point to each tag's curve."""
        for tag, value in _tagged(scalars).items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run under the tags of `TAGS`. The environment's ``WANDB_*`` settle the rest.

    Args:
        folder: Where W&B keeps its local files.
        run_config: The run's configuration, shown beside its curves.
        resume_step: The step that the run resumes after, or None for a fresh start.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(
        self,
        folder: Path,
        run_config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "metrics.enable_wandb = true needs the package wandb, which is not installed:\n"
                "pip install 'octavo[wandb]', or set metrics.enable_wandb = false"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"dir": str(folder), "config": dict(run_config or {})}
        if resume_step is not None:
            # Goes on with the run that WANDB_RUN_ID names, where it is set.
            settings["resume"] = "allow"
        self._run = wandb.init(**settings)

    def log(self, step: int, scalars: Scalars) -> None:
        """Log one step."""
        self._run.log(_tagged(scalars), step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def build_sinks(
    config: MetricsConfig,
    run_folder: Path,
    *,
    rank: int = 0,
    is_metrics_rank: bool = True,
    resume_step: int | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """The sinks of one rank.

    ``metrics.jsonl`` and W&B are the metrics rank's alone. TensorBoard is too, unless
    `save_for_all_ranks`: then each rank writes to its own ``rank_N``.

    Args:
        config: The ``[metrics]`` section.
        run_folder: Root of the run's outputs, `job.dump_folder`.
        rank: This process's global rank.
        is_metrics_rank: Whether this process is the one that holds the run's loss and writes it.
        resume_step: The step that the run resumes after, or None for a fresh start.
        run_config: The run's configuration, for W&B.

    Raises:
        ValueError: A sink was asked for whose package is not installed.
    """
    sinks: list[Sink] = []
    if is_metrics_rank:
        sinks.append(JsonlSink(run_folder, resume_step))
    if config.enable_tensorboard and (is_metrics_rank or config.save_for_all_ranks):
        folder = run_folder / config.save_tb_folder
        if config.save_for_all_ranks:
            folder /= f"rank_{rank}"
        sinks.append(TensorBoardSink(folder, resume_step))
    if config.enable_wandb and is_metrics_rank:
        sinks.append(WandbSink(run_folder, run_config, resume_step))
    if config.save_for_all_ranks and not config.enable_tensorboard and is_metrics_rank:
        logger.warning("metrics.save_for_all_ranks has no effect without metrics.enable_tensorboard")
    return sinks
