"""The global token stream of real runs: the same for every number of processes, also across a resume."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.commands.tokenize import tokenize

REPO = Path(__file__).parents[2]
STEPS, SEQUENCES = 6, 8


def run(folder: Path, processes: int, *flags: str) -> np.ndarray:
    """Train, and return the stream: (windows, tokens | labels | document ids, S), in global order."""
    record = folder / f"record-{len(list(folder.glob('record-*')))}"
    record.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    settings = [
        f"--job.dump_folder={folder}",
        f"--training.global_batch_size={SEQUENCES}",
        "--training.seq_len=32",
        "--model.overrides.n_layers=1",
        "--model.overrides.dim=64",
        "--debug.seed=7",
        "--lr_scheduler.warmup_steps=1",
        "--checkpoint.enable",
        "--checkpoint.last_save_model_only=false",
    ]
    environment = {**os.environ, "RECORD": str(record), "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, str(REPO / "tests/integration/stream_worker.py"), *settings, *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
        check=False,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ranks = [np.load(record / f"rank-{rank}.npy") for rank in range(processes)]
    # (micro-batches, kinds, B, S) a rank: micro-batch by micro-batch, rank by rank, row by row.
    return np.concatenate([rank[m].swapaxes(0, 1) for m in range(len(ranks[0])) for rank in ranks])


def digest(stream: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(stream).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(400)))
    return tokenize(str(text), str(folder / "out"), workers=1, tokenizer=str(REPO / "tests/assets/tokenizer"))


def test_one_stream_for_one_two_and_four_processes_across_a_resume(tmp_path, tokens):
    """A mixture of text and token files; accumulation of 4, 2 and 1; stopped at a step drawn at random."""
    mixture = f"--training.mixture=python_sources=2,token_files:{tokens}=1"
    whole = run(tmp_path / "one", 1, mixture, f"--training.steps={STEPS}", "--training.local_batch_size=2")
    assert whole.shape == (STEPS * SEQUENCES, 3, 32)
    stop = int(np.random.default_rng().integers(1, STEPS))
    first = run(tmp_path / "two", 2, mixture, f"--training.steps={stop}", "--training.local_batch_size=2")
    second = run(tmp_path / "two", 4, mixture, f"--training.steps={STEPS}", "--training.local_batch_size=2")
    assert len(first) == stop * SEQUENCES
    assert digest(np.concatenate([first, second])) == digest(whole), f"stopped after step {stop}"
