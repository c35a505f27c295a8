"""Runs that something happens to: start, wait for a line or a step, signal, read what is left."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from trainer.checkpoint.integrity import verify
from trainer.checkpoint.manifest import FULL, open_checkpoint
from trainer.metrics.history import read_history

REPO = Path(__file__).parents[2]
TINY = [
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=1000",
    "--metrics.log_freq=1",
    "--model.overrides.n_layers=2",
    "--model.overrides.dim=32",
    "--model.overrides.n_heads=2",
    "--model.overrides.n_kv_heads=2",
    "--model.overrides.multiple_of=16",
    "--checkpoint.enable",
    "--debug.seed=3",
]
PATIENCE_SECONDS = 180


class Started:
    """A run in the background; its output goes to a file."""

    def __init__(self, folder, *flags, ngpu=2, env=None, name="run"):
        self.folder, self.ngpu = folder / name, ngpu
        environment = {**os.environ, "NGPU": str(ngpu), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("CONFIG_FILE", None)
        self._log = folder / f"{name}-{time.monotonic_ns()}.txt"
        with self._log.open("w") as out:
            self.process = subprocess.Popen(
                [str(REPO / "run_train.sh"), *TINY, f"--job.dump_folder={self.folder}", *flags],
                env={**environment, **(env or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def out(self):
        return self._log.read_text()

    def until(self, condition):
        """Wait for `condition()`; the run must not end before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, self.out[-4000:]
            assert time.monotonic() < deadline, self.out[-4000:]
            time.sleep(0.005)

    def until_step(self, step):
        path = self.folder / "metrics.jsonl"
        self.until(lambda: path.exists() and f'"step": {step},' in path.read_text())

    def until_line(self, text):
        self.until(lambda: text in self.out)

    def worker(self, rank):
        """Process id of a rank."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child.pid
        raise AssertionError(f"no rank {rank}")

    def send(self, number, rank=None):
        os.kill(self.process.pid if rank is None else self.worker(rank), number)

    def finish(self):
        """Exit code."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        finally:
            self.kill()

    def kill(self):
        if self.process.poll() is None:
            tree = psutil.Process(self.process.pid)
            for victim in [*tree.children(recursive=True), tree]:
                victim.send_signal(signal.SIGKILL)
            self.process.wait()

    @property
    def steps_logged(self):
        return read_history(self.folder).curve("loss")[0]

    @property
    def bits(self):
        """Losses and gradient norms, as hex, by step."""
        history = read_history(self.folder)
        return [
            {step: float(value).hex() for step, value in zip(*history.curve(key), strict=True)}
            for key in ("loss", "grad_norm")
        ]

    def newest_checkpoint(self):
        """(step, windows consumed) of the newest one, which must be full and valid."""
        folders = sorted((self.folder / "checkpoint").glob("step-*"), key=lambda p: int(p.name[5:]))
        assert folders, self.out[-3000:]
        verify(folders[-1])
        manifest = open_checkpoint(folders[-1])[1]
        assert manifest.content == FULL
        return manifest.step, manifest.dataloader["windows"]

    @property
    def report(self):
        return json.loads((self.folder / "crash_report.json").read_text())
