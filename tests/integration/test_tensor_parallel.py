"""Real runs of ./run_train.sh over gloo: tensor-parallel layouts train as one process does."""

import re

import pytest

FP32 = "--training.mixed_precision_param=float32"
TP2 = "--parallelism.tensor_parallel_degree=2"
FLOAT8 = ("--model.converters=float8", "--quantize.linear.float8.filter_fqns=output,wk,wv")
VALIDATION = (
    "--validation.enable",
    "--validation.steps=2",
    "--validation.freq=4",
    "--validation.seq_len=64",
    "--validation.local_batch_size=4",
)
PER_OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")


def curves(run):
    """Losses, gradient norms and largest losses of the steps, and the validation losses."""
    losses = run.losses
    validation = [float(loss) for loss in re.findall(r"validation at \d+  loss  ([\d.]+)", run.out)]
    return {
        "loss": losses,
        "grad_norm": run.curve("grad_norm"),
        "max_loss": run.curve("max_loss"),
        "validation": validation,
    }


def assert_close(got, want, tolerance, keys):
    for key in keys:
        assert len(want[key]) == len(got[key]) > 0, key
        worst = max(abs(a - b) / abs(b) for a, b in zip(got[key], want[key], strict=True))
        assert worst < tolerance, (key, worst)


def test_two_and_four_processes_train_as_one(train):
    """FSDP 2 x TP 2 reads other data per rank: its largest loss is another, its sums are the same."""
    one = curves(train(FP32, *VALIDATION, name="one"))
    two = train(FP32, *VALIDATION, TP2, *PER_OP, ngpu=2, name="tp2")
    assert "tensor parallel over 2: 16 matrices split" in two.out
    assert_close(curves(two), one, 1e-5, ["loss", "grad_norm", "max_loss", "validation"])
    halves = ("--training.local_batch_size=2", "--validation.local_batch_size=2")
    four = train(FP32, *VALIDATION, TP2, *halves, ngpu=4, name="fsdp2tp2")
    assert "mesh: dp_shard 2 x tp 2" in four.out
    assert_close(curves(four), one, 1e-5, ["loss", "grad_norm", "validation"])


def test_float8_with_filtered_keys_and_values_trains_as_one(train):
    """The default precision, bf16; wk and wv stay plain linears beside a float8 wq."""
    one = curves(train(*FLOAT8, name="one"))
    two = train(*FLOAT8, TP2, ngpu=2, name="tp2")
    assert "16 matrices split (10 by a converter's style)" in two.out
    assert "5 gathered inputs, 2 of them as a converter says" in two.out
    assert_close(curves(two), one, 0.01, ["loss", "grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), FLOAT8], ids=["plain", "float8"])
def test_compiled_blocks_and_loss_train_as_one(train, flags):
    one = curves(train(FP32, *flags, name="one"))
    two = train(FP32, *flags, TP2, "--compile.enable", ngpu=2, name="tp2")
    assert_close(curves(two), one, 1e-3 if flags else 1e-5, ["loss", "grad_norm"])


@pytest.mark.slow
def test_replicas_of_split_models_train_as_one(train):
    flags = ("--model.overrides.tied_output", "--training.local_batch_size=2")
    one = curves(train(FP32, *flags, name="one"))
    four = train(FP32, *flags, TP2, "--parallelism.data_parallel_replicate_degree=2", ngpu=4, name="hsdp")
    assert_close(curves(four), one, 1e-5, ["loss", "grad_norm"])
