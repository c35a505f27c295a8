"""Whole runs inside the test's process, with a hand in them before they begin."""

import gc
import logging
from pathlib import Path

import pytest
import torch

TINY = [
    "--training.steps=6",
    "--metrics.log_freq=1",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--lr_scheduler.warmup_steps=2",
    "--model.overrides.n_layers=2",
    "--model.overrides.dim=32",
    "--model.overrides.n_heads=4",
    "--model.overrides.n_kv_heads=2",
    "--model.overrides.multiple_of=16",
    "--debug.seed=1",
]


class Prepared:
    """A trainer that `train` runs to its end; the process group goes with it."""

    def __init__(self, trainer, folder, caplog):
        self.trainer, self.folder, self._caplog = trainer, folder, caplog

    @property
    def log(self):
        return self._caplog.text

    @property
    def losses(self):
        from trainer.metrics.history import read_history

        return read_history(self.folder).curve("loss")

    def state(self):
        """Every tensor of the run's state, copied; of a model that is not sharded over ranks."""
        found = self.trainer.state.tensors("full").items()
        local = {key: t.to_local() if hasattr(t, "to_local") else t for key, t in found}
        return {key: tensor.detach().clone() for key, tensor in local.items()}

    def train(self):
        self._caplog.set_level(logging.INFO)
        self.trainer.train()
        return self


@pytest.fixture
def prepare(tmp_path, monkeypatch, caplog):
    """prepare(*flags, name=...): build a Trainer in this process."""
    from parallelisms.distributed import Rank
    from trainer.config.preflight import preflight
    from trainer.trainer import Trainer

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    repo = Path(__file__).parents[2]
    caplog.set_level(logging.INFO)

    def leave_group():
        gc.enable()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def go(*flags, name="run", signals=None):
        leave_group()
        config = f"--job.config_file={repo}/train_configs/debug_model.toml"
        loaded = preflight([config, *TINY, f"--job.dump_folder={tmp_path / name}", *flags], 1)
        trainer = Trainer(loaded, Rank(0, 0, 1, torch.device("cpu")), signals)
        return Prepared(trainer, tmp_path / name, caplog)

    yield go
    leave_group()
