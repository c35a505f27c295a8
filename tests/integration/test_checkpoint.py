"""Runs that are killed, resumed and moved to other layouts: real processes, over gloo."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.ranks import run_ranks
from trainer.checkpoint.folders import step_folders
from trainer.checkpoint.integrity import read_records, verify
from trainer.metrics.history import read_history

REPO = Path(__file__).parents[2]
FLAGS = [
    "--training.steps=12",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--training.global_batch_size=4",
    "--lr_scheduler.warmup_steps=2",
    "--metrics.log_freq=1",
    "--model.overrides.n_layers=2",
    "--model.overrides.dim=32",
    "--model.overrides.n_heads=2",
    "--model.overrides.n_kv_heads=2",
    "--model.overrides.multiple_of=16",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.keep_latest_k=3",
]
FLOAT8 = [
    "--model.converters=float8",
    "--quantize.linear.float8.emulate",
    "--quantize.linear.float8.scaling_type_input=delayed",
    "--quantize.linear.float8.scaling_type_weight=delayed",
    "--quantize.linear.float8.scaling_type_grad_output=delayed",
]


def start(folder, flags, ngpu, output=subprocess.PIPE, **more):
    environment = {
        **os.environ,
        "NGPU": str(ngpu),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }
    environment.pop("CONFIG_FILE", None)
    return subprocess.Popen(
        [str(REPO / "run_train.sh"), *FLAGS, f"--job.dump_folder={folder}", *flags],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-4000:]
    return out


def kill_after(process, folder, step):
    """SIGKILL the launcher and all workers, once `step` is logged; workers are not in its process group."""
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.communicate()


def bits(folder):
    history = read_history(folder)
    assert history.curve("loss")[0] == list(range(1, 13))
    return [[float(value).hex() for value in history.curve(key)[1]] for key in ("loss", "grad_norm")]


def data_files(folder):
    return {k: v for k, v in read_records(folder).items() if k.startswith("rank-")}


@pytest.mark.parametrize(
    ("ngpu", "flags", "kills"),
    [(1, ["--checkpoint.async_mode=async"], 2), (2, FLOAT8, 1)],
    ids=["one process, async", "two processes, float8 delayed, remote"],
)
def test_a_killed_run_is_the_unbroken_run(tmp_path, ngpu, flags, kills):
    """R1, short: losses and gradient norms to the bit, and the bytes of the last checkpoint.

    The seed is drawn by the first process and kept by those after it.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole, [*flags, "--debug.seed=3"], ngpu))
    if ngpu == 2:
        flags = [*flags, f"--checkpoint.folder=local://{broken}/checkpoint"]
    dice = random.Random(0)
    for number in range(kills):
        process = start(broken, [*flags, "--debug.seed=3"], ngpu)
        kill_after(process, broken, dice.randrange(3 + 4 * number, 7 + 4 * number))
    out = finish(start(broken, [*flags, "--debug.seed=3"], ngpu))
    assert "resumed from" in out
    assert bits(whole) == bits(broken)
    last = [folder / "checkpoint" / "step-12" for folder in (whole, broken)]
    verify(last[1])
    assert data_files(last[0]) == data_files(last[1])
    assert sorted(path.name for path in (broken / "checkpoint").glob("step*")) == [
        "step-10",
        "step-12",
        "step-8",
    ]


# Stage of a save (of tests/trainer/checkpoint/kill_in_save.py), and the rank that dies there.
STAGES = [
    ("planned", 1),
    ("folder made", 0),
    ("first block", 1),
    ("tensors written", 0),
    ("tensors synced", 1),
    ("before the manifest", 0),
    ("before integrity", 0),
    ("before the marker", 0),
    ("before the rename", 0),
    ("after the rename", 0),
    ("before pruning", 0),
    ("while pruning", 0),
]


def check_kills_inside_saves(folder, mode, stages):
    """Kill a rank at each stage of the save of step 8; each time the newest complete step is gone on from."""
    flags = ["--debug.seed=3", "--checkpoint.keep_latest_k=2", f"--checkpoint.async_mode={mode}"]
    whole = folder / "whole"
    finish(start(whole, flags, 2))
    module = ["--experimental.custom_import=kill_in_save"]
    path = f"{REPO / 'tests/trainer/checkpoint'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    for stage, rank in stages:
        broken = folder / stage.replace(" ", "-")
        trapped = start(broken, [*flags, *module], 2, KILL_AT=f"{stage} 8 {rank}", PYTHONPATH=path)
        out, _ = trapped.communicate(timeout=400)
        assert trapped.returncode != 0, (stage, out[-4000:])  # 137, or 1 where the other rank fails first
        steps = {found.step: found.path for found in step_folders(broken / "checkpoint")}
        published = stage in ("after the rename", "before pruning", "while pruning")
        assert max(steps) == (8 if published else 6), stage
        for path_of_step in steps.values():
            verify(path_of_step)
        # Nothing complete is lost: pruning had its turn only at the last stage.
        assert set(steps) >= ({6, 8} if published else {4, 6}), stage
        out = finish(start(broken, flags, 2))
        assert f"step-{max(steps)} (step {max(steps)}," in out, stage
        assert bits(whole) == bits(broken), stage
        assert data_files(whole / "checkpoint" / "step-12") == data_files(broken / "checkpoint" / "step-12")
        assert {p.name for p in (broken / "checkpoint").iterdir()} == {".lock", "step-10", "step-12"}, stage
        shutil.rmtree(broken)


def test_a_rank_dies_inside_a_save(tmp_path):
    """R2, short: the other rank has written its file, and nothing says complete."""
    check_kills_inside_saves(tmp_path, "async", [("first block", 1)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_rank_dies_at_every_stage_of_a_save(tmp_path, mode):
    """R2."""
    check_kills_inside_saves(tmp_path, mode, STAGES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path, capsys, monkeypatch):
    """R1: twenty times in one run of two processes, at random moments, also inside saves."""
    from trainer.cli import main

    monkeypatch.setenv("NGPU", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CONFIG_FILE", str(REPO / "train_configs/debug_model.toml"))
    flags = [*FLAGS, *FLOAT8, f"--job.dump_folder={tmp_path}", "--checkpoint.async_mode=async"]
    assert main(["selftest", "resume", "--steps=82", "--kills=20", "--interval=3", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("killed after step") == 20
    assert "identical: a killed run resumes exactly here" in out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_run_stays_as_small_as_it_was(tmp_path):
    """R17: memory, descriptors, threads and folder of a process that saves after each of its steps."""
    steps = 1500
    flags = [f"--training.steps={steps}", "--checkpoint.interval=1", "--checkpoint.async_mode=async"]
    process = start(tmp_path, flags, 1, output=subprocess.DEVNULL)  # a pipe that no one reads fills up
    seen = {}
    for step in (100, 500, 900, 1300):
        while f'"step": {step},' not in _tail(tmp_path / "metrics.jsonl"):
            assert process.poll() is None
            time.sleep(0.02)
        worker = psutil.Process(process.pid).children(recursive=True)[-1]
        size = sum(path.stat().st_size for path in (tmp_path / "checkpoint").rglob("*.safetensors"))
        seen[step] = (worker.memory_info().rss, worker.num_fds(), worker.num_threads(), size)
    assert process.wait(timeout=600) == 0
    print(seen)
    rss, descriptors, threads, sizes = zip(*seen.values(), strict=True)
    assert rss[-1] - rss[0] < 30 * 2**20
    assert max(descriptors) - min(descriptors) <= 4  # a save may have its files open at that moment
    assert max(threads) - min(threads) <= 3  # and its threads
    assert max(sizes) < 5 * 2_000_000
    assert len(step_folders(tmp_path / "checkpoint")) == 3


def _tail(path):
    return path.read_bytes()[-4000:].decode() if path.exists() else ""


def work(folder, world_size, task, *layouts):
    run_ranks(world_size, "tests/trainer/checkpoint/layouts_worker.py", folder, task, *layouts)


def check_layouts(folder, makers, loaders):
    for world_size, layouts in makers.items():
        work(folder, world_size, "make", *layouts)
    for world_size, layouts in loaders.items():
        work(folder, world_size, "load", *layouts)
    compared = 0
    for source in [layout for layouts in makers.values() for layout in layouts]:
        reference = json.loads((folder / f"{source}-as-{source}.json").read_text())
        for layout in [layout for layouts in loaders.values() for layout in layouts]:
            got = json.loads((folder / f"{source}-as-{layout}.json").read_text())
            assert got["hashes"] == reference["hashes"], (source, layout)
            assert got["losses"][2:] == pytest.approx(reference["losses"][2:], rel=1e-6), (source, layout)
            compared += 1
    return compared


def test_a_checkpoint_loads_under_any_layout(tmp_path):
    """R9: parameters and moments hash-equal, the next losses within 1e-6 relative in fp32."""
    two = ["fsdp2", "ddp2", "tp2"]
    assert check_layouts(tmp_path, {1: ["one"], 2: two}, {1: ["one"], 2: two}) == 16


def test_a_checkpoint_moves_into_a_pipeline_and_out_of_it(tmp_path):
    """The same, for stages: names are those of the whole model."""
    assert check_layouts(tmp_path, {1: ["one"], 2: ["pp2"]}, {1: ["one"], 2: ["pp2_v"]}) == 4


@pytest.mark.slow
def test_a_checkpoint_loads_under_any_layout_of_four(tmp_path):
    four = ["fsdp2_tp2", "hsdp2x2", "pp2_fsdp2"]
    makers = {1: ["one"], 2: ["fsdp2", "tp2"], 4: four}
    assert check_layouts(tmp_path, makers, {1: ["one"], 2: ["fsdp2", "ddp2"], 4: four}) == 36


def test_the_command_lists_verifies_shows_and_prunes(tmp_path, capsys):
    from trainer.cli import main

    run = tmp_path / "run"
    finish(start(run, ["--training.steps=6"], 1))
    assert main(["checkpoint", "list", str(run)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["step", "2", "4", "6"]
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("valid") == 3
    assert main(["checkpoint", "show", str(run / "checkpoint" / "step-4")]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "tokens seen 512" in shown
    assert "data python_sources: epoch 0, document 0, offset 0" in shown
    broken = run / "checkpoint" / "step-6" / "rank-00000.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")
    assert main(["checkpoint", "verify", str(run)]) == 4
    assert "INVALID  rank-00000.safetensors" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--dry-run"]) == 0
    assert "kept step-4; would remove step-2" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert sorted(path.name for path in (run / "checkpoint").glob("step*")) == ["step-4", "step-6"]
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    assert main(["checkpoint", "list", str(tmp_path / "nothing")]) == 2


def test_the_selftest_kills_resumes_and_compares(tmp_path, capsys, monkeypatch):
    from trainer.cli import main

    monkeypatch.setenv("NGPU", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CONFIG_FILE", str(REPO / "train_configs/debug_model.toml"))
    flags = [*FLAGS, f"--job.dump_folder={tmp_path}", "--checkpoint.async_mode=async"]
    assert main(["selftest", "resume", "--steps=8", "--kills=1", *flags]) == 0
    out = capsys.readouterr().out
    assert "start 2: resumed from step-" in out
    assert [line.split()[1:4] for line in out.splitlines() if line.startswith(("loss", "grad_norm"))] == [
        ["8", "steps", "8"],
        ["8", "steps", "8"],
    ]
    assert "identical: a killed run resumes exactly here" in out
    assert list(tmp_path.iterdir()) == []
    assert main(["selftest", "resume", "--training.stepz=1"]) == 2
    assert main(["selftest", "resume", "--kills=0"]) == 2
