"""Ways to gather and reduce that fit neither the precision nor the layout are refused, with the reason."""

import pytest

from trainer.config import checks
from trainer.config.load import load

WIRE, POOL = (
    "--parallelism.fsdp_reduce_scatter=bfloat16_wire",
    "--parallelism.fsdp_reduce_scatter=compute_pool",
)
COPIES = "--parallelism.fsdp_transport=copy_engine"
DIRECT = "--parallelism.fsdp_single_shard=direct"
TORCH = "--parallelism.fsdp_reduce_scatter=torch"
FP32 = "--training.mixed_precision_param=float32"
BF16 = "--training.dtype=bfloat16"
OFFLOAD = "--training.enable_cpu_offload"
FLOAT8_GATHER = ("--model.converters=float8", "--quantize.linear.float8.enable_fsdp_float8_all_gather")


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ([WIRE], 2, None),
        ([WIRE], 1, None),
        ([WIRE, FP32], 2, "needs bf16 gradients"),
        ([WIRE, "--parallelism.pipeline_parallel_degree=2"], 2, "micro-batches in bf16"),
        ([POOL, "--parallelism.pipeline_parallel_degree=2"], 2, None),
        ([COPIES], 2, None),
        ([COPIES, WIRE], 2, None),
        ([COPIES, POOL], 2, "needs parallelism.fsdp_reduce_scatter 'bfloat16_wire', got 'compute_pool'"),
        ([COPIES, FP32], 2, "'copy_engine' sends gradients in bf16"),
        ([COPIES, OFFLOAD], 2, "keeps weights on the host"),
        ([COPIES, "--parallelism.pipeline_parallel_degree=2"], 2, "'copy_engine' would sum a pipeline's"),
        ([DIRECT], 1, None),
        ([DIRECT, "--model.converters=float8"], 1, None),
        ([DIRECT, "--parallelism.fsdp_reshard_after_forward=never"], 1, None),
        ([DIRECT], 2, "for one device alone, there are 2 processes"),
        ([DIRECT, "--training.global_batch_size=16"], 1, "add 2 micro-batches up in bf16"),
        ([DIRECT, FP32], 1, "the weights again"),
        ([DIRECT, BF16], 1, "no copy in bf16"),
        ([DIRECT, OFFLOAD], 1, "training.enable_cpu_offload does not"),
        ([DIRECT, "--parallelism.fsdp_reshard_after_forward=always"], 1, "'always' frees them"),
        ([DIRECT, WIRE], 1, "would have no effect"),
        ([DIRECT, *FLOAT8_GATHER], 1, None),
        (
            [DIRECT, *FLOAT8_GATHER, "--quantize.linear.float8.keep_float8_shards"],
            1,
            "keep_float8_shards would have no effect",
        ),
    ],
)
def test_what_does_not_go_together(flags, processes, expected):
    messages = [problem.message for problem in checks.problems(load(flags, env={}), processes)]
    assert [expected in message for message in messages] == ([] if expected is None else [True]), messages


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([POOL], None), ([POOL, BF16], "cast to training.dtype"), ([POOL, OFFLOAD], "copied to the host")],
)
def test_a_pool_without_effect_is_warned_about(flags, expected):
    lines = checks.warnings(load(flags, env={}))
    assert [expected in line for line in lines] == ([] if expected is None else [True]), lines


@pytest.mark.parametrize(
    ("flags", "shards", "reshards"),
    [
        ([TORCH], 1, True),
        ([], 8, True),
        ([POOL], 1, False),
        ([POOL], 8, True),
        ([WIRE], 1, False),
        ([DIRECT], 1, False),
        ([POOL, "--parallelism.fsdp_reshard_after_forward=always"], 1, True),
        (["--parallelism.pipeline_parallel_degree=2"], 8, False),
    ],
)
def test_weights_of_one_shard_stay_where_gradients_share_their_pool(flags, shards, reshards):
    parallelism = load(flags, env={}).config.parallelism
    assert parallelism.reshards_after_forward(shards) is reshards
