"""What ``auto`` becomes, with and without kernels, and that nothing stays ``auto``."""

import pytest

from trainer.config.device_defaults import with_device_defaults
from trainer.config.load import load

ONE_PASS = "--optimizer.implementation=one_pass"
FLOAT8 = "--quantize.linear.float8"
COPIES_WHERE_IT_CAN = "--parallelism.fsdp_transport=auto"
CONVERT = "--model.converters=float8"


def chosen(flags, *, kernels=True, world_size=1, peers=False):
    loaded = load(flags, env={})
    config = with_device_defaults(loaded.config, kernels=kernels, world_size=world_size, peers=peers)
    float8, parallelism = config.quantize.linear.float8, config.parallelism
    return {
        "loss": config.training.loss_kernel,
        "casts": float8.cast_kernels,
        "input": float8.saved_input,
        "single": parallelism.fsdp_single_shard,
        "reduce": parallelism.fsdp_reduce_scatter,
        "transport": parallelism.fsdp_transport,
        "kept": float8.keep_float8_shards,
        "recast": float8.force_recompute_fp8_weight_in_bwd,
    }


def test_without_kernels_everything_is_torchs():
    assert chosen([ONE_PASS, CONVERT], kernels=False) == {
        "loss": "torch",
        "casts": "torch",
        "input": "high_precision",
        "single": "copy",
        "reduce": "torch",
        "transport": "nccl",
        "kept": False,
        "recast": False,
    }


def test_one_gpu():
    assert chosen([ONE_PASS, CONVERT]) == {
        "loss": "fused",
        "casts": "triton",
        "input": "float8",
        "single": "direct",
        "reduce": "torch",
        "transport": "nccl",
        "kept": False,
        "recast": False,
    }


@pytest.mark.parametrize(("peers", "transport"), [(True, "copy_engine"), (False, "nccl")])
def test_two_gpus(peers, transport):
    found = chosen([ONE_PASS, CONVERT, COPIES_WHERE_IT_CAN], world_size=2, peers=peers)
    assert (found["single"], found["reduce"], found["transport"]) == ("copy", "bfloat16_wire", transport)


@pytest.mark.parametrize(
    ("flags", "reduce"),
    [
        (["--parallelism.tensor_parallel_degree=2"], "bfloat16_wire"),
        (["--parallelism.tensor_parallel_degree=4"], "compute_pool"),
        (["--parallelism.context_parallel_degree=4"], "bfloat16_wire"),
        (["--parallelism.data_parallel_replicate_degree=4"], "compute_pool"),
        (["--parallelism.pipeline_parallel_degree=2"], "compute_pool"),
        (["--training.mixed_precision_param=float32"], "compute_pool"),
        (["--training.dtype=bfloat16"], "torch"),
        (["--parallelism.fsdp_reduce_scatter=compute_pool"], "compute_pool"),
    ],
)
def test_gradients_travel_in_bf16_where_they_are_sharded_and_reduced_at_once(flags, reduce):
    found = chosen([*flags, COPIES_WHERE_IT_CAN], world_size=4, peers=True)
    assert found["reduce"] == reduce
    assert found["transport"] == ("copy_engine" if reduce == "bfloat16_wire" else "nccl")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--parallelism.fsdp_transport=nccl"], ("bfloat16_wire", "nccl")),
        (["--parallelism.fsdp_transport=copy_engine"], ("bfloat16_wire", "copy_engine")),
        (
            ["--parallelism.fsdp_transport=copy_engine", "--training.dtype=bfloat16"],
            ("bfloat16_wire", "copy_engine"),
        ),
        (
            ["--parallelism.fsdp_reduce_scatter=bfloat16_wire", "--training.enable_cpu_offload"],
            ("bfloat16_wire", "nccl"),
        ),
    ],
)
def test_a_transport_that_is_given_brings_its_wire(flags, expected):
    found = chosen(flags, world_size=2, peers="nccl" not in flags[0])
    assert (found["reduce"], found["transport"]) == expected


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [ONE_PASS, "--training.global_batch_size=16"],
        [ONE_PASS, "--training.mixed_precision_param=float32"],
        [ONE_PASS, "--parallelism.fsdp_reshard_after_forward=always"],
        [ONE_PASS, f"{FLOAT8}.enable_fsdp_float8_all_gather", f"{FLOAT8}.keep_float8_shards", CONVERT],
    ],
    ids=["fused", "accumulated", "fp32", "freed", "kept"],
)
def test_weights_are_copied_where_direct_would_be_refused_or_cost_memory(flags):
    found = chosen(flags)
    assert (found["single"], found["reduce"]) == ("copy", "compute_pool")


@pytest.mark.parametrize("flag", ["--training.dtype=bfloat16", "--training.enable_cpu_offload"])
def test_torchs_reduction_where_another_has_no_effect(flag):
    found = chosen([flag])
    assert (found["single"], found["reduce"]) == ("copy", "torch")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([f"{FLOAT8}.cast_kernels=torch"], {"casts": "torch", "input": "high_precision"}),
        ([f"{FLOAT8}.emulate"], {"casts": "torch", "input": "high_precision"}),
        ([f"{FLOAT8}.recipe_name=rowwise_with_gw_hp"], {"casts": "triton", "input": "high_precision"}),
        ([f"{FLOAT8}.saved_input=high_precision"], {"casts": "triton", "input": "high_precision"}),
        (["--compile.enable"], {"casts": "triton", "input": "least", "recast": True}),
        (["--compile.enable", f"{FLOAT8}.no_force_recompute_fp8_weight_in_bwd"], {"recast": False}),
        (["--compile.enable", f"{FLOAT8}.enable_fsdp_float8_all_gather"], {"recast": False}),
        (["--compile.enable", f"{FLOAT8}.cast_kernels=torch"], {"recast": False}),
        (
            ["--compile.enable", "--compile.components=loss"],
            {"loss": "torch", "input": "float8", "recast": False},
        ),
        (["--compile.enable", "--model.overrides.swiglu_kernel=fused"], {"input": "float8"}),
        (["--compile.enable", f"{FLOAT8}.recipe_name=rowwise_with_gw_hp"], {"input": "high_precision"}),
        (["--compile.enable", "--compile.components=model,loss"], {"loss": "fused"}),
        (["--training.loss_kernel=torch"], {"loss": "torch"}),
        ([ONE_PASS, "--parallelism.fsdp_reduce_scatter=torch"], {"single": "copy", "reduce": "torch"}),
        ([ONE_PASS, "--parallelism.fsdp_single_shard=copy"], {"single": "copy", "reduce": "compute_pool"}),
        (["--parallelism.fsdp_single_shard=direct"], {"single": "direct", "reduce": "torch"}),
    ],
)
def test_what_is_given_stays_and_the_rest_gives_way(flags, expected):
    found = chosen([CONVERT, *flags])
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("saved", ["float8", "least"])
def test_saved_float8_brings_its_casts(saved):
    assert chosen([CONVERT, f"{FLOAT8}.saved_input={saved}"], kernels=False)["casts"] == "triton"


GATHER = f"{FLOAT8}.enable_fsdp_float8_all_gather"
KEEP = f"{FLOAT8}.keep_float8_shards"
STAYS = "--parallelism.fsdp_reshard_after_forward=never"
ACCUMULATES = "--training.global_batch_size=64"


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ([GATHER], True),
        ([], False),
        ([GATHER, STAYS], False),
        ([GATHER, STAYS, ACCUMULATES], True),
        ([GATHER, "--training.enable_cpu_offload"], False),
        ([GATHER, "--parallelism.data_parallel_replicate_degree=4"], False),
        ([GATHER, "--parallelism.data_parallel_replicate_degree=2"], True),
        ([GATHER, "--parallelism.context_parallel_degree=4"], True),
        ([GATHER, "--parallelism.tensor_parallel_degree=4"], False),
        ([GATHER, "--parallelism.pipeline_parallel_degree=2", ACCUMULATES], False),
        ([GATHER, f"{FLOAT8}.no_keep_float8_shards"], False),
        ([GATHER, STAYS, KEEP], True),
        ([GATHER, f"{KEEP}=auto"], True),
    ],
)
def test_float8_shards_are_kept_where_a_weight_is_gathered_again(flags, kept):
    assert chosen([CONVERT, *flags], world_size=4)["kept"] is kept


def test_shards_are_kept_without_kernels_where_asked():
    found = [chosen([CONVERT, GATHER, *flags], kernels=False, world_size=4)["kept"] for flags in ([], [KEEP])]
    assert found == [False, True]
