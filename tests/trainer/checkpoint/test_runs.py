"""Whole runs in this process: what is saved when, what a run starts from, what may change in between."""

import json
import shutil

import pytest
import torch

from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.integrity import read_records
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.manifest import open_checkpoint
from trainer.config.errors import ConfigError
from trainer.forward import Forward


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[k].full_tensor(), right[k].full_tensor()) for k in left)


def damage(folder):
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_in_two_parts_is_the_run_in_one(run):
    whole = run(name="whole")
    run("--training.steps=2", name="parts")
    parts = run(name="parts")
    assert whole.losses == parts.losses
    assert same(whole.model, parts.model)
    assert "resumed from" in parts.log
    assert "changed since: training.steps 2 -> 4" in parts.log
    names = [folder / "checkpoint" / "step-4" for folder in (whole.folder, parts.folder)]
    records = [read_records(name)["rank-00000.safetensors"] for name in names]
    assert records[0] == records[1]
    rows = [json.loads(line) for line in (parts.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [128, 256, 384, 512]


def test_generators_follow_from_seed_and_step(run, monkeypatch):
    """What is drawn between steps, as a compiler does that tries kernels out, changes nothing."""
    forward_backward, due = Forward.forward_backward, CheckpointManager.due
    drawn, noisy = [], [False]

    def drawing(forward, *arguments, **options):
        drawn.append(float(torch.rand(())))
        return forward_backward(forward, *arguments, **options)

    def after_step(checkpoints, step, **options):
        torch.rand(step if noisy[0] else 1)
        return due(checkpoints, step, **options)

    monkeypatch.setattr(Forward, "forward_backward", drawing)
    monkeypatch.setattr(CheckpointManager, "due", after_step)
    whole = run(name="whole")
    quiet, drawn[:], noisy[0] = drawn.copy(), [], True
    run("--training.steps=2", name="parts")
    parts = run(name="parts")
    assert len(set(quiet)) == 8  # two micro-batches in each of 4 steps
    assert drawn == quiet
    names = [found.folder / "checkpoint" / "step-4" for found in (whole, parts)]
    records = [read_records(name)["rank-00000.safetensors"] for name in names]
    assert records[0] == records[1]
    drawn.clear()
    run("--debug.seed=2", name="other")
    assert not set(drawn) & set(quiet)


def test_a_save_right_after_a_validation(run):
    """Which leaves the parameters gathered, as other objects than those that the optimizer knows."""
    flags = ("--validation.enable", "--validation.freq=2", "--validation.steps=1", "--validation.seq_len=32")
    validated = run(*flags, name="validated")
    plain = run(name="plain")
    assert same(validated.model, plain.model)
    places = [found.folder / "checkpoint" / "step-2" for found in (validated, plain)]
    records = [read_records(place)["rank-00000.safetensors"] for place in places]
    assert records[0] == records[1]


def test_a_drawn_seed_goes_on(run):
    first = run("--debug.seed=none", "--training.steps=2")
    again = run("--debug.seed=none")
    assert first.trainer.seed == again.trainer.seed
    assert len(again.losses) == 4


def test_async_writes_the_same_bytes(run):
    """R15: of every step, while training goes on."""
    flags = ("--checkpoint.interval=1", "--checkpoint.keep_latest_k=0")
    sync = run(*flags, name="sync")
    background = run(*flags, "--checkpoint.async_mode=async", name="async")
    assert sync.losses == background.losses
    assert "copied, training stood still for" in background.log
    assert background.checkpoints == ["step-1", "step-2", "step-3", "step-4"]
    for name in sync.checkpoints:
        folders = [found.folder / "checkpoint" / name for found in (sync, background)]
        assert (
            read_records(folders[0])["rank-00000.safetensors"]
            == (read_records(folders[1])["rank-00000.safetensors"])
        )


def test_what_is_saved_when(run):
    assert run("--checkpoint.interval=3", name="a").checkpoints == ["step-3", "step-4"]
    first = run("--checkpoint.interval=3", "--checkpoint.enable_first_step_checkpoint", name="b")
    assert first.checkpoints == ["step-1", "step-3", "step-4"]
    kept = run("--checkpoint.interval=1", "--checkpoint.keep_latest_k=2", name="c")
    assert kept.checkpoints == ["step-3", "step-4"]
    assert "removed step-2" in kept.log
    assert run("--checkpoint.load_only", name="d").checkpoints == []
    nothing_left = run(name="a")
    assert "nothing is left to train" in nothing_left.log
    assert nothing_left.checkpoints == ["step-3", "step-4"]


def test_time_in_saves_is_outside_tps(run):
    done = run()
    rows = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["time_checkpoint"] > 0 == rows[1]["time_checkpoint"]


def test_new_rates_take_effect(run):
    run("--training.steps=2")
    again = run("--training.steps=3", "--optimizer.lr=1e-5", "--optimizer.weight_decay=0.3")
    rows = [json.loads(line) for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["lr"] <= 1e-5
    groups = again.trainer.optimizer.param_groups
    assert groups[0]["weight_decay"] == 0.3
    assert "optimizer.lr" in again.log
    assert "optimizer.weight_decay 0.1 -> 0.3" in again.log


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.overrides.n_layers=3"], "has model.overrides.n_layers = 2, now it is 3"),
        (["--model.overrides.n_layers=1"], "has model.overrides.n_layers = 2, now it is 1"),
        (["--model.overrides.dim=64"], "has model.overrides.dim = 32, now it is 64"),
        (["--training.dataset=python_sources_validation"], "saved with dataset = 'python_sources'"),
        (["--debug.seed=7"], "saved with seed = 1"),
    ],
)
def test_unsafe_changes_are_refused(run, flags, expected):
    run("--training.steps=2")
    with pytest.raises(ConfigError) as caught:
        run(*flags)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_model_that_computes_something_else_is_refused_unless_told(run):
    """Settings that leave every shape as it is: the tensors fit, the function is another."""
    run("--training.steps=2")
    theta, heads = "--model.overrides.rope_theta=10000", "--model.overrides.norm_eps=1e-6"
    for flag, expected in ((theta, "has rope_theta = 500000.0, now 10000.0"), (heads, "norm_eps")):
        with pytest.raises(ConfigError) as caught:
            run(flag)
        assert expected in str(caught.value)
        assert "--checkpoint.accept_model_changes" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3
    told = run(theta, "--checkpoint.accept_model_changes")
    assert "rope_theta 500000.0 -> 10000.0" in told.log
    assert told.trainer.step == 4
    # Another kernel, or a longer RoPE table, is the same function.
    kernel = "--model.overrides.rope_kernel=fused"
    assert "resumed from" in run("--training.steps=5", theta, kernel, "--training.seq_len=64").log


def test_a_disk_without_room_for_a_checkpoint_is_met_before_the_first_step(run, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    tight = run()
    assert "has room for 1 more checkpoints of 2," in tight.log
    assert tight.checkpoints == ["step-2", "step-4"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError) as caught:
        run(name="full")
    assert "full/checkpoint has no room for a checkpoint" in str(caught.value)
    assert "1,000,000 are free there" in str(caught.value)
    saved = sum(path.stat().st_size for path in (tight.folder / "checkpoint" / "step-4").iterdir())
    needed = int(str(caught.value).split("it needs ")[1].split(" ")[0].replace(",", ""))
    assert saved < needed < saved + 2**20 + 10_000


def test_another_tokenizer_is_refused_unless_the_data_starts_anew(run, tmp_path):
    run("--training.steps=2")
    shutil.copytree("tests/assets/tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    flag = f"--model.hf_assets_path={tmp_path}/tokenizer"
    with pytest.raises(ConfigError, match="tokenizer"):
        run(flag)
    again = run(flag, "--checkpoint.exclude_from_loading=dataloader")
    assert "not loaded: dataloader" in again.log
    assert again.trainer.step == 4


def test_parts_can_be_left_out(run):
    folder = run("--training.steps=2").folder
    shutil.copytree(folder, folder.with_name("b"))
    no_moments = run("--checkpoint.exclude_from_loading=optimizer,lr_scheduler", "--training.steps=3")
    steps = [float(state["step"]) for state in no_moments.trainer.optimizer.state.values()]
    assert set(steps) == {1.0}
    assert no_moments.trainer.lr_scheduler.last_epoch == 1
    afresh = run("--checkpoint.exclude_from_loading=train_state", "--training.steps=3", name="b")
    assert afresh.trainer.step == 3
    assert afresh.trainer.tokens_seen == 3 * 128


def test_a_broken_newest_step_is_skipped_and_a_chosen_one_is_an_error(run):
    folder = run().folder / "checkpoint"
    damage(folder / "step-4")
    again = run("--training.steps=5")
    assert f"skipped {folder / 'step-4'}: rank-00000.safetensors: its checksum differs" in again.log
    assert f"resumed from {folder / 'step-2'}" in again.log
    damage(folder / "step-2")
    with pytest.raises(CheckpointError) as caught:
        run("--training.steps=6", "--checkpoint.load_step=2")
    message = f"error: {caught.value}"
    assert message.startswith(f"error: {folder / 'step-2'}: rank-00000.safetensors")
    assert len(message.splitlines()) <= 3


def test_weights_of_another_run(run):
    source = run(name="source")
    path = f"--checkpoint.initial_load_path={source.folder}/checkpoint"
    started = run(path, "--training.steps=1", name="weights")
    assert "weights from" in started.log
    assert started.trainer.step == 1
    assert started.losses[0] == pytest.approx(source.losses[-1], rel=0.2)
    whole = run(path, "--checkpoint.initial_load_model_only=false", "--training.steps=5", name="whole")
    assert whole.trainer.tokens_seen == 5 * 128
    with pytest.raises(CheckpointError) as caught:
        run(path, "--model.overrides.dim=64", name="other")
    message = f"error: {caught.value}"
    assert "it is of another model" in message
    assert len(message.splitlines()) <= 3


def test_a_last_save_of_the_model_alone(run):
    flags = ("--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16")
    done = run(*flags)
    _, manifest = open_checkpoint(done.folder / "checkpoint" / "step-4")
    assert {entry.dtype for entry in manifest.tensors.values()} == {"BF16"}
    assert {key.partition(".")[0] for key in manifest.tensors} == {"model"}
    again = run("--training.steps=5")
    assert "step-4: holds the model only" in again.log
    assert "resumed from" in again.log
    assert len(again.losses) == 5
    started = run(f"--checkpoint.initial_load_path={done.folder}/checkpoint/step-4", name="from")
    assert "weights from" in started.log


def test_a_seed_checkpoint_gives_the_first_weights(run):
    seed = run("--checkpoint.create_seed_checkpoint", "--debug.seed=5", name="seed")
    assert seed.checkpoints == ["step-0"]
    assert seed.losses == []
    shutil.copytree(seed.folder, seed.folder.with_name("other"))
    # Seed 1 would draw other weights.
    other = run("--checkpoint.load_only", name="other")
    own = run("--debug.seed=1", name="own")
    assert "weights from" in other.log
    assert other.losses[0] != own.losses[0]
    assert len(other.losses) == 4


def test_pinned_copies_are_as_the_others_without_a_gpu(run):
    done = run("--checkpoint.async_mode=async_with_pinned_mem", name="pinned")
    plain = run(name="plain")
    written = [
        read_records(found.folder / "checkpoint" / "step-4")["rank-00000.safetensors"]
        for found in (done, plain)
    ]
    assert written[0] == written[1]
    if not torch.cuda.is_available():
        assert "no CUDA device: training waits for copies" in done.log


def test_a_failed_save_goes_on_in_between_and_ends_the_run_at_its_end(run, monkeypatch):
    usage = shutil.disk_usage("/")
    free = iter([usage.free, 0, 0])  # asked before the run, before a save, and for its error message
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free, usage.free)))
    done = run()
    assert "step-2 was not saved: the disk is full" in done.log
    assert "training goes on" in done.log
    assert done.checkpoints == ["step-4"]
    free = iter([usage.free, *[0] * 100])
    with pytest.raises(CheckpointError) as caught:
        run("--checkpoint.interval=10", name="end")
    message = f"error: {caught.value}"
    assert "step-4 was not saved" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--quantize.linear.float8.scaling_type_input=delayed"],
        ["--quantize.linear.float8.enable_fsdp_float8_all_gather"],
        [
            "--quantize.linear.float8.enable_fsdp_float8_all_gather",
            "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
        ],
    ],
    ids=["delayed", "all-gather", "precomputed"],
)
def test_float8_goes_on_exactly(run, flags):
    float8 = ["--model.converters=float8", "--quantize.linear.float8.emulate", *flags]
    whole = run(*float8, name="whole")
    run(*float8, "--training.steps=2", name="parts")
    parts = run(*float8, name="parts")
    assert [loss.hex() for loss in whole.losses] == [loss.hex() for loss in parts.losses]
    assert same(whole.model, parts.model)
    # The checkpoint's model knows nothing of float8: a run without it loads it.
    plain = run("--training.steps=5", name="parts")
    assert "resumed from" in plain.log


def test_tied_weights_are_stored_once(run):
    tied = run("--model.overrides.tied_output", "--training.steps=2")
    _, manifest = open_checkpoint(tied.folder / "checkpoint" / "step-2")
    assert "model.output.weight" not in manifest.tensors
    again = run("--model.overrides.tied_output")
    whole = run("--model.overrides.tied_output", name="whole")
    assert again.losses == whole.losses
