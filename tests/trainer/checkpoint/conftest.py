"""Checkpoints of a few tensors, and whole runs inside the test's process."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trainer.checkpoint.folders import step_folder
from trainer.checkpoint.manifest import FULL, Manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.writer import local_data, make_plan, to_host, write_checkpoint

TINY = [
    "--training.steps=4",
    "--metrics.log_freq=1",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=10",
    "--model.overrides.n_layers=2",
    "--model.overrides.dim=32",
    "--model.overrides.n_heads=4",
    "--model.overrides.n_kv_heads=2",
    "--model.overrides.multiple_of=16",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
]


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a.weight": torch.randn(7, 5, generator=generator),
        "model.b.weight": torch.randn(33, generator=generator).to(torch.bfloat16),
        "optimizer.a.weight.step": torch.tensor(float(seed)),
        "rng.0.cpu": torch.randint(256, (11,), generator=generator).to(torch.uint8),
    }


def write(root, step, tensors=None, content=FULL):
    tensors = some_tensors(step) if tensors is None else tensors
    ranks = Ranks()
    manifest = Manifest(step, content, {"step": step, "tokens_seen": 10 * step, "seed": 1, "world_size": 1})
    plan = make_plan(tensors, None, ranks)
    target = step_folder(root, step)
    write_checkpoint(target, plan, lambda box: to_host(local_data(tensors, box), box), manifest, ranks)
    return target


@pytest.fixture
def save():
    """save(root, step): writes a checkpoint of a few tensors, others for each step; returns its folder."""
    return write


@pytest.fixture
def tensors_of():
    """The tensors that `save` writes for a step."""
    return some_tensors


@pytest.fixture
def root(tmp_path):
    """An empty checkpoint folder."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


@dataclass
class QuickRun:
    """A run in this process."""

    trainer: object
    folder: Path
    log: str
    losses: list

    @property
    def checkpoints(self):
        return sorted(path.name for path in (self.folder / "checkpoint").glob("step-*"))

    @property
    def model(self):
        return {k: v.clone() for k, v in self.trainer.state.tensors("model").items()}


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """Train in this process: a second or so; returns a QuickRun."""
    from parallelisms.distributed import Rank
    from trainer.config.preflight import preflight
    from trainer.metrics.history import read_history
    from trainer.trainer import Trainer

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    repo = Path(__file__).parents[3]

    def go(*flags, name="run"):
        config = f"--job.config_file={repo}/train_configs/debug_model.toml"
        folder = tmp_path / name
        caplog.clear()
        caplog.set_level(logging.INFO)
        loaded = preflight([config, *TINY, "--debug.seed=1", f"--job.dump_folder={folder}", *flags], 1)
        try:
            trainer = Trainer(loaded, Rank(0, 0, 1, torch.device("cpu")))
            trainer.train()
        finally:
            gc.enable()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        losses = read_history(folder).curve("loss")[1] if (folder / "metrics.jsonl").stat().st_size else []
        return QuickRun(trainer, folder, caplog.text, list(losses))

    return go
