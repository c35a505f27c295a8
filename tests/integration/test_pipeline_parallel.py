"""Pipelines against one process: losses, gradient norms, validation, over gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.metrics.history import read_history

REPO = Path(__file__).parents[2]
SCHEDULES = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]
FLAGS = [
    "--metrics.log_freq=1",
    "--training.seq_len=32",
    "--training.local_batch_size=4",
    "--training.global_batch_size=8",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--model.overrides.n_layers=4",
    "--model.overrides.dim=64",
    "--model.overrides.n_heads=4",
    "--model.overrides.n_kv_heads=2",
    "--model.overrides.multiple_of=32",
    "--debug.seed=1",
]
PP = "--parallelism.pipeline_parallel_"


def pp(schedule, degree=2, *flags):
    return [f"{PP}degree={degree}", f"{PP}schedule={schedule}", *flags]


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [str(server.getsockname()[1]) for server in sockets]
    for server in sockets:
        server.close()
    return ports


def work(folder, world_size, runs, steps):
    """Run `runs` (name -> flags) one after the other in `world_size` processes."""
    listed = [[name, [*FLAGS, f"--training.steps={steps}", *flags]] for name, flags in runs.items()]
    ports = ",".join(free_ports(len(runs)))
    script = str(REPO / "tests/parallelisms/pipeline_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(folder), ports, json.dumps(listed)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "localhost",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outs = [worker.communicate(timeout=540)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(out[-3000:] for out in outs)
    return outs


def curves(folder, name):
    history = read_history(folder / name)
    return {key: list(history.curve(key)[1]) for key in ("loss", "grad_norm", "validation_loss")}


def compare(folder, name, reference, tolerance=1e-5):
    mine, wanted = curves(folder, name), curves(folder, reference)
    for key, values in wanted.items():
        assert len(values) > 0 or key == "validation_loss"
        assert mine[key] == pytest.approx(values, rel=tolerance), (name, key)


VALIDATE = [
    "--validation.enable",
    "--validation.steps=2",
    "--validation.freq=3",
    "--validation.seq_len=48",
    "--validation.local_batch_size=3",
]


def test_pipelines_follow_one_process(tmp_path):
    """Two schedules, with accumulation, unequal numbers of ignored labels, and validation of another shape."""
    work(tmp_path, 1, {"one": VALIDATE}, 6)
    runs = {name: [*pp(name), *VALIDATE] for name in ("1F1B", "ZBVZeroBubble")}
    outs = work(tmp_path, 2, runs, 6)
    assert "1F1B, 2 stages: tok_embeddings, layers.0-1 | layers.2-3, norm, output" in outs[0]
    for name in runs:
        compare(tmp_path, name, "one")
    assert len(curves(tmp_path, "one")["validation_loss"]) == 3


@pytest.mark.slow
def test_every_schedule_follows_one_process(tmp_path):
    work(tmp_path, 1, {"one": VALIDATE}, 20)
    runs = {name: [*pp(name), *VALIDATE] for name in SCHEDULES}
    work(tmp_path, 2, runs, 20)
    for name in runs:
        compare(tmp_path, name, "one")


@pytest.mark.slow
def test_four_ranks_follow_one_process(tmp_path):
    deep = ["--model.overrides.n_layers=8", "--training.local_batch_size=8"]
    work(tmp_path, 1, {"one": [*deep, *VALIDATE]}, 20)
    runs = {name: [*pp(name, 4), *deep, *VALIDATE] for name in SCHEDULES}
    work(tmp_path, 4, runs, 20)
    for name in runs:
        compare(tmp_path, name, "one")
