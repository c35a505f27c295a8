"""Shared fixtures: skip what this machine lacks, and run training as a user does."""

import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

if not Path("/dev/nvidiactl").exists():
    # Without a GPU Triton kernels are tested by Triton's interpreter; it reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Skip GPU tests without the GPUs, and slow ones unless asked for by marker."""
    import torch

    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two CUDA GPUs, this machine has {gpus}"))
        elif item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with -m slow"))


@pytest.fixture(autouse=True)
def _own_logging():
    """Undo what a test that runs a command in this process leaves in the root logger: a closed stream."""
    root = logging.getLogger()
    handlers, level, complain = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = handlers, complain
    root.setLevel(level)


@dataclass
class Run:
    """A finished training run."""

    code: int
    out: str
    err: str
    folder: Path

    def curve(self, key):
        """Values of one column of metrics.jsonl, over the logged steps."""
        from trainer.metrics.history import read_history

        return list(read_history(self.folder).curve(key)[1])

    @property
    def losses(self):
        """The logged losses, at full precision."""
        assert self.code == 0, self.out[-2000:] + self.err[-4000:]
        return self.curve("loss")

    def differences(self, other):
        """The largest |a - b| / |b| between this run's curves and another's: losses, gradient norms."""
        mine = {"loss": self.losses, "grad_norm": self.curve("grad_norm")}
        theirs = {"loss": other.losses, "grad_norm": other.curve("grad_norm")}
        assert len(mine["loss"]) == len(theirs["loss"]) > 0
        return {
            key: max(abs(a - b) / abs(b) for a, b in zip(mine[key], theirs[key], strict=True)) for key in mine
        }


SMALL = [
    "--training.steps=5",
    "--metrics.log_freq=1",
    "--training.seq_len=64",
    "--training.local_batch_size=4",
    "--training.global_batch_size=8",
    "--lr_scheduler.warmup_steps=2",
    "--debug.seed=1",
    "--model.overrides.n_layers=2",
]


@pytest.fixture
def train(tmp_path):
    """Run ./run_train.sh with a small debug model; returns a Run."""

    def go(*flags, ngpu=1, name="run", small=True, env=None):
        folder = tmp_path / name
        command = [
            str(REPO / "run_train.sh"),
            *(SMALL if small else []),
            f"--job.dump_folder={folder}",
            *flags,
        ]
        environment = {
            **os.environ,
            "NGPU": str(ngpu),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **(env or {}),
        }
        environment.pop("CONFIG_FILE", None)
        environment.update(env or {})
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
        return Run(done.returncode, done.stdout, done.stderr, folder)

    return go
