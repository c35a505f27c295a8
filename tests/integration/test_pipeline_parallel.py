"""Pipelines against one process: losses, gradient norms, validation, over gloo."""

import json
from pathlib import Path

import pytest

from tests.integration.ranks import run_ranks
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


def work(folder, world_size, runs, steps):
    """Run `runs` (name -> flags) one after the other in `world_size` processes."""
    listed = [[name, [*FLAGS, f"--training.steps={steps}", *flags]] for name, flags in runs.items()]
    return run_ranks(world_size, "tests/parallelisms/pipeline_worker.py", folder, json.dumps(listed))


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
    """Two schedules; accumulation, unequal numbers of ignored labels, validation of another shape."""
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


@pytest.mark.slow
def test_pipelines_of_shards_replicas_and_split_matrices(tmp_path):
    """PP 2 x FSDP 2, x DDP 2 (accumulated), x TP 2: four processes."""
    work(tmp_path, 1, {"one": VALIDATE}, 20)
    layouts = {
        "fsdp": [],
        "always": ["--parallelism.fsdp_reshard_after_forward=always"],
        "ddp": ["--parallelism.data_parallel_replicate_degree=2", "--training.local_batch_size=2"],
        "fsdp_accumulated": ["--training.local_batch_size=2"],
        "tp": ["--parallelism.tensor_parallel_degree=2"],
    }
    runs = {f"1F1B_{name}": pp("1F1B", 2, *VALIDATE, *flags) for name, flags in layouts.items()}
    for name in ("fsdp", "fsdp_accumulated", "tp"):
        runs[f"izb_{name}"] = pp("InterleavedZeroBubble", 2, *VALIDATE, *layouts[name])
    runs["int_always"] = pp("Interleaved1F1B", 2, *VALIDATE, *layouts["always"])
    runs["zbv_tp"] = pp("ZBVZeroBubble", 2, *VALIDATE, *layouts["tp"])

    work(tmp_path, 4, runs, 20)
    for name in runs:
        mine, wanted = curves(tmp_path, name), curves(tmp_path, "one")
        keys = ("loss", "grad_norm", "validation_loss") if name.endswith("tp") else ("loss", "grad_norm")
        for key in keys:
            assert mine[key] == pytest.approx(wanted[key], rel=1e-5), (name, key)


@pytest.mark.slow
def test_all_three_together(tmp_path):
    """PP 2 x FSDP 2 x TP 2 in eight processes, also with full checkpointing."""
    work(tmp_path, 1, {"one": []}, 8)
    tp = "--parallelism.tensor_parallel_degree=2"
    runs = {
        "eager": pp("Interleaved1F1B", 2, tp),
        "full": pp("1F1B", 2, tp, "--activation_checkpoint.mode=full"),
    }
    work(tmp_path, 8, runs, 8)
    for name in runs:
        compare(tmp_path, name, "one", 1e-5)


@pytest.mark.slow
def test_compiled_with_split_matrices(tmp_path):
    """PP 2 x TP 2, each block a compiled graph."""
    work(tmp_path, 1, {"one": []}, 4)
    work(
        tmp_path,
        4,
        {"compiled": pp("1F1B", 2, "--parallelism.tensor_parallel_degree=2", "--compile.enable")},
        4,
    )
    compare(tmp_path, "compiled", "one")


@pytest.mark.slow
def test_compiled_and_recomputed_pipelines(tmp_path):
    per_op = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
    work(tmp_path, 1, {"one": []}, 6)
    runs = {
        "full": pp("1F1B", 2, "--activation_checkpoint.mode=full"),
        "full_izb": pp("InterleavedZeroBubble", 2, "--activation_checkpoint.mode=full"),
        "op": pp("Interleaved1F1B", 2, *per_op),
        "compiled": pp("1F1B", 2, "--compile.enable", *per_op),
        "compiled_loss": pp("ZBVZeroBubble", 2, "--compile.enable", "--compile.components=loss"),
    }
    work(tmp_path, 2, runs, 6)
    for name in runs:
        compare(tmp_path, name, "one")


FLOAT8 = [
    "--model.converters=float8",
    "--quantize.linear.float8.emulate",
    "--quantize.linear.float8.filter_fqns=output",
    "--quantize.linear.float8.log_stats_freq=1",
    "--training.local_batch_size=8",
]
DELAYED = [
    *FLOAT8,
    *(f"--quantize.linear.float8.scaling_type_{t}=delayed" for t in ("input", "weight", "grad_output")),
]


@pytest.mark.slow
def test_float8_in_a_pipeline_is_float8_in_one_process(tmp_path):
    """With the whole batch as one micro-batch all scales are the same, so all numbers are.

    Delayed scales are synchronised among the ranks of a stage only; statistics are those of all stages.
    """
    whole = [f"{PP}microbatch_size=8"]
    work(tmp_path, 1, {"dynamic": FLOAT8, "delayed": DELAYED}, 6)
    runs = {
        f"{kind}_{name}": pp(name, 2, *flags, *whole)
        for kind, flags in {"dynamic": FLOAT8, "delayed": DELAYED}.items()
        for name in ("GPipe", "ZBVZeroBubble")
    }
    outs = work(tmp_path, 2, runs, 6)
    assert "float8: converted 28 of 29 linears" in outs[0]
    for name in runs:
        reference = name.partition("_")[0]
        compare(tmp_path, name, reference, 1e-6)
        mine, wanted = (read_history(tmp_path / run).rows[-1] for run in (name, reference))
        tags = {key for key in wanted if key.startswith("float8/")}
        assert len(tags) > 300
        assert {key: mine[key] for key in tags} == pytest.approx({key: wanted[key] for key in tags}, rel=1e-5)


def test_a_split_and_an_order_of_ones_own(tmp_path):
    """Named modules for each stage, and a schedule from a file: GPipe's, written by hand."""
    order = tmp_path / "order.csv"
    order.write_text("0F0,0F1,0F2,0F3,,,0B0,0B1,0B2,0B3\n,1F0,1F1,1F2,1F3,1B0,1B1,1B2,1B3\n")
    parts = [["tok_embeddings"], [*(f"layers.{i}" for i in range(4)), "norm", "output"]]
    work(tmp_path, 1, {"one": []}, 3)
    runs = {
        "order": pp("PipelineScheduleMulti", 2, f"{PP}schedule_csv={order}"),
        "parts": pp("1F1B", 2, f"--parallelism.module_fqns_per_model_part={json.dumps(parts)}"),
    }
    outs = work(tmp_path, 2, runs, 3)
    assert "2 stages: tok_embeddings | layers.0-3, norm, output" in outs[0]
    for name in runs:
        compare(tmp_path, name, "one")


@pytest.mark.slow
def test_delayed_scales_move_into_a_pipeline_and_out_of_it(tmp_path):
    """Steps 1-2 in a pipeline, 3-4 in one process, 5-6 in another pipeline: as all six in one process."""
    kept = [
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        "--checkpoint.last_save_model_only=false",
        "--lr_scheduler.total_steps=10",
    ]
    flags, whole = [*DELAYED, *kept], [f"{PP}microbatch_size=8"]
    work(tmp_path, 1, {"one": flags}, 6)
    work(tmp_path, 2, {"moved": pp("GPipe", 2, *flags, *whole)}, 2)
    work(tmp_path, 1, {"moved": flags}, 4)
    outs = work(tmp_path, 2, {"moved": pp("ZBVZeroBubble", 2, *flags, *whole)}, 6)
    assert "resumed from" in outs[0]
    losses = [
        row["loss"]
        for path in sorted((tmp_path / "moved").glob("metrics*.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
        if "loss" in row
    ]
    assert sorted(losses) == pytest.approx(sorted(curves(tmp_path, "one")["loss"]), rel=1e-6)
