"""One training, many layouts: losses and gradient norms of every mesh are those of one process, in fp32.

The short form runs with every change; the matrix (`-m slow`) takes the debug model as it is shipped, for 20
steps, over all layouts, with accumulation, with labels ignored in unequal numbers, with a tied output.
"""

import json
import re

import pytest

FP32 = "--training.mixed_precision_param=float32"
TOLERANCE = 1e-5


def degrees(**axes):
    """Flags for `replicate=2, tensor=2` and the like."""
    names = {
        "replicate": "data_parallel_replicate_degree",
        "shard": "data_parallel_shard_degree",
        "tensor": "tensor_parallel_degree",
        "context": "context_parallel_degree",
        "rotate": "context_parallel_rotate_method",
        "balance": "context_parallel_load_balancer",
    }
    return [f"--parallelism.{names[axis]}={value}" for axis, value in axes.items()]


def validations(run):
    return [float(loss) for loss in re.findall(r"validation at \d+  loss  ([\d.]+)", run.out)]


def test_layouts_of_one_global_batch_agree(train):
    """One process, two shards, two replicas."""
    one = train(FP32, name="one")
    layouts = {
        "fsdp2": train(FP32, ngpu=2, name="fsdp2"),
        "ddp2": train(FP32, *degrees(replicate=2), ngpu=2, name="ddp2"),
        "ddp2_accumulated": train(
            FP32, *degrees(replicate=2), "--training.local_batch_size=2", ngpu=2, name="ddp2_acc"
        ),
        "fsdp2_accumulated": train(FP32, "--training.local_batch_size=2", ngpu=2, name="acc"),
    }
    for name, run in layouts.items():
        assert max(run.differences(one).values()) < TOLERANCE, name


def test_tied_output_is_the_same_in_two_layouts(train):
    flags = (FP32, "--model.overrides.tied_output")
    one, two = train(*flags, name="one"), train(*flags, ngpu=2, name="two")
    assert max(two.differences(one).values()) < TOLERANCE


def test_spread_sequences_train_as_whole_ones(train):
    """Two and four processes; validation reads longer sequences than training, and documents are masked."""
    flags = (
        FP32,
        "--validation.enable",
        "--validation.steps=2",
        "--validation.freq=4",
        "--validation.seq_len=128",
    )
    one = train(*flags, "--validation.local_batch_size=4", name="one")
    two = train(*flags, "--validation.local_batch_size=4", *degrees(context=2), ngpu=2, name="cp2")
    assert "context parallel over 2: 2 attentions in a ring (allgather)" in two.out
    half = ("--training.local_batch_size=2", "--validation.local_batch_size=2")
    four = train(*flags, *half, *degrees(context=2, rotate="alltoall"), ngpu=4, name="fsdp2cp2")
    for run in (two, four):
        assert max(run.differences(one).values()) < TOLERANCE
        assert validations(run) == pytest.approx(validations(one), rel=TOLERANCE)
    assert two.curve("max_loss") == pytest.approx(one.curve("max_loss"), rel=TOLERANCE)


MATRIX = {
    "FSDP 2": (2, degrees(shard=2)),
    "FSDP 4": (4, degrees(shard=4)),
    "HSDP 2 x 2": (4, degrees(replicate=2, shard=2)),
    "DDP 2": (2, degrees(replicate=2, shard=1)),
    "TP 2": (2, degrees(tensor=2)),
    "TP 4": (4, degrees(tensor=4)),
    "FSDP 2 x TP 2": (4, degrees(shard=2, tensor=2)),
    "CP 2": (2, degrees(context=2)),
    "CP 4, all-to-all, one chunk": (4, degrees(context=4, rotate="alltoall", balance="none")),
    "FSDP 2 x CP 2": (4, degrees(shard=2, context=2)),
    "DDP 2 x CP 2": (4, degrees(replicate=2, context=2)),
    "CP 2 x TP 2": (4, degrees(context=2, tensor=2)),
}
"""Layout -> processes and flags."""

IGNORES_LABELS = """
from trainer.data import loader

DATASETS = {}
read = loader.DataLoader.__iter__

def masked(self):
    for batch in read(self):
        labels = batch.labels.clone()
        for row in labels:
            row[row[0] % 61 + 1:] = -100  # between 1 and 61 labels are left of a sequence
        yield batch._replace(labels=labels, label_count=int((labels != -100).sum()))

loader.DataLoader.__iter__ = masked
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("tied", "accumulated", "ignored"),
    [(False, False, False), (False, True, True), (True, True, True)],
)
def test_every_layout_trains_as_one_process(train, tmp_path, tied, accumulated, ignored):
    (tmp_path / "ignores_labels.py").write_text(IGNORES_LABELS)
    common = [
        FP32,
        "--training.steps=20",
        "--training.seq_len=64",
        "--training.global_batch_size=8",
        "--metrics.log_freq=1",
        "--debug.seed=1",
        *(["--model.overrides.tied_output"] if tied else []),
        *(["--experimental.custom_import=ignores_labels"] if ignored else []),
    ]

    def run(name, processes, flags):
        sizes = dict(re.findall(r"parallelism\.(\w+)_degree=(\d)", " ".join(flags)))
        data_ranks = int(sizes.get("data_parallel_replicate", 1)) * int(sizes.get("data_parallel_shard", 1))
        local = f"--training.local_batch_size={8 // data_ranks // (2 if accumulated else 1)}"
        env = {"PYTHONPATH": str(tmp_path)}
        return train(*common, local, *flags, ngpu=processes, name=name, small=False, env=env)

    one = run("one process", 1, [])
    found = {}
    for name, (processes, flags) in MATRIX.items():
        found[name] = run(name, processes, flags).differences(one)
        print(
            f"{name:<28} loss {found[name]['loss']:.1e}  grad_norm {found[name]['grad_norm']:.1e}", flush=True
        )
    assert max(max(each.values()) for each in found.values()) < TOLERANCE, found


def compiling_steps(run):
    """Steps in whose log interval anything was compiled."""
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row.get("time_compile", 0) > 0]


def test_nothing_is_compiled_after_the_first_step(train):
    """Float8 with float8 all-gather, per-op recomputation, FSDP2 over two shards."""
    run = train(
        "--compile.enable",
        "--compile.backend=aot_eager",
        "--model.converters=float8",
        "--quantize.linear.float8.enable_fsdp_float8_all_gather",
        "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
        ngpu=2,
    )
    assert run.code == 0, run.err
    assert compiling_steps(run) == [1]


@pytest.mark.slow
def test_other_lengths_of_validation_compile_once(train):
    """Under context parallelism, where positions change too; the first validation is in step 2's interval."""
    run = train(
        "--compile.enable",
        "--compile.backend=aot_eager",
        "--validation.enable",
        "--validation.steps=2",
        "--validation.freq=2",
        "--validation.seq_len=128",
        "--validation.local_batch_size=2",
        *degrees(context=2),
        ngpu=2,
    )
    assert run.code == 0, run.err
    assert len(validations(run)) == 3
    assert compiling_steps(run) == [1, 2]
