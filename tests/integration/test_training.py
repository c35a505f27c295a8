"""Real runs of ./run_train.sh on the CPU, over gloo, with one and two processes."""

import json
import re

import pytest

FP32 = "--training.mixed_precision_param=float32"
STEP = re.compile(
    r"^step: [ \d]\d+  loss: +\d+\.\d{5}  grad_norm: +\d+\.\d{4}  memory: +\d+\.\d\dGiB\(\d+\.\d\d%\)"
    r"  tps: [\d,]+  tflops: [\d,]+\.\d\d  mfu: (\d+\.\d\d%|n/a)$",
    re.M,
)


def test_a_run_from_start_to_summary(train):
    run = train(
        "--metrics.enable_tensorboard",
        "--validation.enable",
        "--validation.steps=2",
        "--validation.freq=4",
        "--validation.seq_len=64",
        "--job.save_config_file=saved.json",
    )
    assert run.code == 0, run.err
    assert len(STEP.findall(run.out)) == 5
    assert "8 sequences of 64: 512 tokens per step" in run.out
    assert "2 accumulated" in run.out
    assert len(re.findall(r"^validation at", run.out, re.M)) == 2
    assert "summary" in run.out
    assert "\x1b[" not in run.out
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["tokens"] for row in steps] == [512, 1024, 1536, 2048, 2560]
    assert {"max_loss", "grad_norm", "lr", "tps", "tflops", "mfu", "memory_gib"} <= steps[0].keys()
    assert steps[0]["lr"] == pytest.approx(1e-3)
    facts = json.loads((run.folder / "run.json").read_text())
    assert (facts["seed"], facts["world_size"]) == (1, 1)
    assert facts["packages"]["torch"]
    assert json.loads((run.folder / "saved.json").read_text())["training"]["seq_len"] == 64
    assert list((run.folder / "tb").rglob("events.out.tfevents.*"))


def test_one_seed_one_curve_and_the_run_folder_repeats_it(train):
    """The seed is drawn once; config.toml of the run folder gives the same losses, digit for digit."""
    first = train("--debug.seed=none", name="first")
    config = first.folder / "config.toml"
    again = train(
        "--job.dump_folder=" + str(first.folder.with_name("again")),
        small=False,
        env={"CONFIG_FILE": str(config)},
        name="again",
    )
    again.folder = first.folder.with_name("again")
    assert first.losses == again.losses
    assert json.loads((first.folder / "run.json").read_text())["seed"] > 0


def test_a_second_run_keeps_what_the_first_one_wrote(train):
    train(name="same")
    run = train("--debug.seed=2", name="same")
    assert run.code == 0, run.err
    assert {"metrics-1.jsonl", "config-1.toml", "run-1.json"} <= {path.name for path in run.folder.iterdir()}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--activation_checkpoint.mode=full",), marks=pytest.mark.slow),
        pytest.param(
            ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"),
            marks=pytest.mark.slow,
        ),
        ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"),
    ],
)
def test_recomputing_changes_no_loss(train, flags):
    assert train(name="kept").losses == train(*flags, name="recomputed").losses


def test_compiled_follows_eager(train):
    eager = train(FP32, name="eager")
    compiled = train(
        FP32,
        "--compile.enable",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
        name="compiled",
    )
    assert "2 blocks, each one full graph" in compiled.out
    assert compiled.differences(eager)["loss"] < 1e-4
    assert re.search(r"compile \d", compiled.out.split("summary")[1])


def test_documents_may_be_kept_apart(train, tmp_path):
    """Many short documents in a window: masking the others changes the first loss, but not its size."""
    lines = (json.dumps({"text": f"document {i} has the number {i * i}. " * 3}) + "\n" for i in range(200))
    (tmp_path / "short.jsonl").write_text("".join(lines))
    flags = (
        "--training.dataset=text_files",
        f"--training.dataset_path={tmp_path}/short.jsonl",
        "--training.steps=2",
    )
    causal = train(*flags, name="causal")
    document = train(*flags, "--model.overrides.attn_mask_type=document", name="document")
    assert causal.losses[0] != document.losses[0]
    assert abs(causal.losses[0] - document.losses[0]) < 0.2


def test_local_files(train, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} " * 50}) + "\n" for i in range(50))
    )
    run = train(
        "--training.dataset=text_files",
        f"--training.dataset_path={tmp_path}/text.jsonl",
        "--training.steps=20",
    )
    assert run.losses[-1] < run.losses[0]
    assert f"from {tmp_path}/text.jsonl" in run.out


def test_loss_falls_on_the_built_in_text(train):
    run = train(
        "--training.steps=40", "--training.seq_len=128", "--metrics.log_freq=10", "--optimizer.lr=3e-3"
    )
    assert run.losses[-1] < run.losses[0] - 1.0
