"""A step before step 1 that leaves no trace: memory and folders fail now or not at all.

It runs one micro-batch of token ids without meaning through forward and backward, and the optimizer with its
gate shut (`trainer.resilience.bad_steps`), which makes the moments and changes nothing. Buffers get their
values back, each step seeds the random generators anew, and the data is not touched. So losses are the same
with and without it.

Not tried: the moments of an optimizer that is not fused, and the memory of a validation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from parallelisms.peer_memory import bytes_held
from trainer.config import derived
from trainer.config.errors import ConfigError
from trainer.data.batches import Batch
from trainer.optim.clipping import clip_grad_norm
from trainer.resilience.bad_steps import gated_step

if TYPE_CHECKING:
    from trainer.trainer import Trainer

log = logging.getLogger(__name__)


def run(trainer: Trainer) -> None:
    """Run it on all ranks.

    Raises:
        ConfigError: a folder that the run will write to cannot be written to.
        torch.OutOfMemoryError: the device is too small for a step.
    """
    started = time.perf_counter()
    if trainer.rank.rank == 0:
        for key, folder in _folders(trainer):
            _try_folder(trainer, key, folder)
    _try_step(trainer)
    memory = ""
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(trainer.device) + bytes_held()
        memory = f", peak memory {peak / 2**30:.2f}GiB"
    log.info("dry batch: a step fits%s (%.1fs)", memory, time.perf_counter() - started)


def _try_step(trainer: Trainer) -> None:
    model, batch = trainer.model, trainer.batch
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shape = (batch.local_batch_size, batch.seq_len)
    tokens = (
        torch.arange(shape[0] * shape[1]).reshape(shape) % derived.model_config(trainer.config).vocab_size
    )
    ids = torch.zeros(shape, dtype=torch.int64)
    micro_batch = Batch(tokens, tokens, ids, tokens.numel())
    valid = torch.tensor(float(tokens.numel()), device=trainer.device)
    trainer.forward.forward_backward(micro_batch, valid, last=True)
    clip_grad_norm(model.parameters(), trainer.config.training.max_norm, trainer.mesh.stage_group)
    gated_step(trainer.optimizer, torch.ones((), device=trainer.device))
    trainer.optimizer.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    trainer.faults.bad_steps.forget()


def _folders(trainer: Trainer) -> Iterator[tuple[str, Path]]:
    config = trainer.config
    if config.checkpoint.enable and not config.checkpoint.load_only:
        yield "checkpoint.folder", trainer.folder / config.checkpoint.folder
    if config.profiling.enable_profiling:
        yield "profiling.save_traces_folder", trainer.folder / config.profiling.save_traces_folder
    if config.profiling.enable_memory_snapshot:
        yield (
            "profiling.save_memory_snapshot_folder",
            (trainer.folder / config.profiling.save_memory_snapshot_folder),
        )
    if config.comm.trace_buf_size > 0:
        yield "comm.save_traces_folder", trainer.folder / config.comm.save_traces_folder


def _try_folder(trainer: Trainer, key: str, folder: Path) -> None:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        for path in made:
            path.rmdir()
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror}"
        raise ConfigError([trainer.loaded.problem(key, message)]) from None
