"""Real runs: other ways to gather and reduce train as FSDP2's own, to the bit."""

import pytest

from tests.integration.test_layouts import compiling_steps

REDUCE, SINGLE = "--parallelism.fsdp_reduce_scatter", "--parallelism.fsdp_single_shard"
FLOAT8 = ("--model.converters=float8", "--quantize.linear.float8.filter_fqns=output")
GATHER = ("--quantize.linear.float8.enable_fsdp_float8_all_gather",)
PRECOMPUTE = "--quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
COMPILED = (
    "--compile.enable",
    "--compile.backend=aot_eager",
    "--activation_checkpoint.selective_ac_option=op",
)
VALIDATION = (
    "--validation.enable",
    "--validation.steps=1",
    "--validation.freq=2",
    "--validation.seq_len=64",
    "--validation.local_batch_size=4",
)
SAVES = ("--checkpoint.enable", "--checkpoint.interval=2")


def test_gradients_that_travel_in_bf16_train_as_those_in_fp32(train):
    """Two shards, so that the order of each sum is the same; two micro-batches a step."""
    flags = (*FLOAT8, "--training.local_batch_size=2", "--training.steps=3")
    want = train(*flags, ngpu=2, name="torch")
    got = train(*flags, f"{REDUCE}=bfloat16_wire", ngpu=2, name="wire")
    assert "compute bf16, gradients summed in fp32 after travelling in bf16" in got.out
    assert got.differences(want) == {"loss": 0, "grad_norm": 0}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["fused", "one_pass"])
@pytest.mark.parametrize("gather", [(), GATHER, (*GATHER, PRECOMPUTE)], ids=["bf16", "float8", "scales"])
def test_direct_weights_train_as_copied_ones(train, gather, optimizer):
    """Compiled blocks, float8 linears, recomputation, validation, saves in between."""
    flags = (*FLOAT8, *gather, *COMPILED, *VALIDATION, *SAVES, "--training.global_batch_size=4")
    want = train(*flags, f"--optimizer.implementation={optimizer}", name="copy")
    got = train(*flags, f"--optimizer.implementation={optimizer}", f"{SINGLE}=direct", name="direct")
    assert got.differences(want) == {"loss": 0, "grad_norm": 0}
    assert got.curve("validation_loss") == want.curve("validation_loss")
    assert compiling_steps(got) == compiling_steps(want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags", "how"),
    [
        (1, (), "compute_pool"),
        (1, ("--training.dtype=bfloat16",), "bfloat16_wire"),
        (2, ("--training.dtype=bfloat16",), "bfloat16_wire"),
        (2, ("--parallelism.pipeline_parallel_degree=2",), "compute_pool"),
        (
            2,
            ("--parallelism.data_parallel_replicate_degree=2", "--training.local_batch_size=2"),
            "compute_pool",
        ),
        (2, ("--parallelism.context_parallel_degree=2",), "bfloat16_wire"),
        (4, ("--parallelism.tensor_parallel_degree=2", "--training.local_batch_size=2"), "bfloat16_wire"),
    ],
    ids=["alone", "alone-bf16", "bf16", "pipeline", "ddp-accumulated", "cp", "tp"],
)
def test_every_layout_reduces_as_torch_does(train, processes, flags, how):
    want = train(*flags, ngpu=processes, name="torch")
    got = train(*flags, f"{REDUCE}={how}", ngpu=processes, name=how)
    assert got.differences(want) == {"loss": 0, "grad_norm": 0}


@pytest.mark.slow
def test_a_resumed_run_with_direct_weights_is_the_unbroken_one(train):
    flags = ("--training.global_batch_size=4", *SAVES, f"{SINGLE}=direct")
    want = train(*flags, "--training.steps=7", name="whole")
    first = train(*flags, "--training.steps=4", "--lr_scheduler.total_steps=7", name="parts")
    assert first.code == 0, first.err
    rest = train(*flags, "--training.steps=7", name="parts")
    assert len(rest.losses) == 7
    assert rest.differences(want) == {"loss": 0, "grad_norm": 0}


def test_copies_between_gpus_need_gpus(train):
    done = train("--parallelism.fsdp_transport=copy_engine", "--training.steps=1")
    assert done.code == 2
    assert done.err == "error: --parallelism.fsdp_transport: copies between GPUs need CUDA GPUs\n"
