"""The planned peak against sums done by hand."""

import dataclasses

import pytest

from tests.trainer.plan.runs import (
    BF16,
    COMPILE,
    DEVICE,
    EIGHT_LAYERS,
    EMBEDDING,
    FLOAT8,
    FORMER,
    GATHER,
    HAND_COUNTED,
    KEEP_TURNED,
    LINEARS,
    NONE,
    NORMS,
    ONE_PASS,
    PRECOMPUTE,
    WHOLE,
    plan,
)
from trainer.config.load import load
from trainer.plan.activations import Recompute
from trainer.plan.layout import build_layout, build_stages
from trainer.plan.memory import GIB, WORKSPACE_BYTES, Ledger, Reduction, replay
from trainer.plan.memory_shape import block_memory, plan_memory, step_shape
from trainer.plan.shapes import read_model


def test_least_keeps_no_casts_of_rowwise_linears():
    """Of the inputs of wo and w2, in each of 8 layers; they stay where nothing can make the product again."""
    flags = [*EIGHT_LAYERS, ONE_PASS, *GATHER, PRECOMPUTE]
    casts = 8 * 8192 * (4096 + 14336)
    saved = {
        (how, swiglu): plan(
            [*flags, f"--float8.saved_input={how}", f"--model.overrides.swiglu_kernel={swiglu}"]
        ).worst.by_category["activations"]
        for how in ("high_precision", "float8", "least")
        for swiglu in ("torch", "fused")
    }
    assert saved["float8", "torch"] - saved["least", "torch"] == casts
    assert saved["float8", "torch"] == saved["float8", "fused"]
    assert saved["least", "fused"] - saved["least", "torch"] == 8 * 8192 * 14336 * 2
    # Left to the compiler, attention's output is cast in backward: it is there anyway.
    assert saved["float8", "torch"] - saved["high_precision", "torch"] == 8 * 8192 * 4096


def test_per_op_recompute_keeps_casts_where_inputs_are_saved_in_float8():
    def kept(*flags):
        config = load([*EIGHT_LAYERS, *FLOAT8, "--float8.cast_kernels=triton", *flags], env={}).config
        layout = build_layout(config, 1)
        return block_memory(config, read_model(config, layout, "cuda"), layout).saved("op")

    none, again = kept("--float8.saved_input=high_precision"), "--float8.force_recompute_fp8_weight_in_bwd"
    # Of the inputs of wk, wo and w3 both casts: their products are computed again.
    assert kept("--float8.saved_input=float8", again) - none == 8192 * (6 * 4096 + 14336)
    assert kept("--float8.saved_input=least", again) - none == 8192 * 4 * 4096
    weights = LINEARS // 8 + 4096 * (1024 + 4096 + 14336)
    assert kept("--float8.saved_input=least") - kept("--float8.saved_input=least", again) == weights


def test_per_op_recompute_is_the_same_in_float8():
    """Every second product in the order of wq wk wv wo w1 w3 w2; named linears are not counted."""

    def sizes(*flags):
        config = load([*EIGHT_LAYERS, *flags], env={}).config
        layout = build_layout(config, 1)
        model = read_model(config, layout, "cuda")
        return model.sizes.recomputed_per_op(), block_memory(config, model, layout).saved("op")

    torch_casts = "--float8.cast_kernels=torch"
    names, kept = sizes()
    assert names == {"attention.wk", "attention.wo", "feed_forward.w3"}
    assert sizes(*FLOAT8, torch_casts) == (names, kept)
    mixed = ["--model.converters=float8", "--float8.filter_fqns=output,wk,w1"]
    assert sizes(*mixed, torch_casts) == (names, kept)
    named = "--activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns=wo"
    assert sizes(*FLOAT8, torch_casts, named) == sizes(named)
    assert sizes(named)[0] == {"attention.wo", "attention.wk", "feed_forward.w1", "feed_forward.w2"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--parallelism.fsdp_single_shard=copy"], 40),
        (["--parallelism.fsdp_single_shard=copy", "--training.max_norm=0"], 28),
        (["--parallelism.fsdp_single_shard=copy", "--optimizer.implementation=one_pass"], 32),
        (["--optimizer.implementation=one_pass"], 30),
        (["--parallelism.fsdp_single_shard=direct"], 52),
    ],
)
def test_bytes_of_the_optimizer(flags, expected):
    found = plan([*EIGHT_LAYERS, *flags]).time.optimizer_seconds
    copied = found * DEVICE["h100"].copy_tb_per_second * 1e12
    assert copied / 2_795_573_248 == pytest.approx(expected)


def test_a_float8_gather_leaves_turned_weights_behind():
    """torchtitan's run has them too: 95.4 GiB."""
    gather = [*FLOAT8, "--quantize.linear.float8.enable_fsdp_float8_all_gather"]
    gather += FORMER
    kept = plan([*WHOLE, *NONE, *COMPILE, *gather], 2, "h200").worst
    assert kept.reserved_bytes / GIB == pytest.approx(95.4, rel=0.05)
    forbidden = [*gather, "--quantize.linear.float8.force_recompute_fp8_weight_in_bwd"]
    turned = kept.reserved_bytes - plan([*WHOLE, *NONE, *COMPILE, *forbidden], 2, "h200").worst.reserved_bytes
    assert turned == 32 * (8_030_261_248 - 2 * 525_336_576 - 65 * 4096) // 32


@pytest.mark.parametrize(("world_size", "pool"), [(2, "gather"), (1, "main")])
def test_kept_float8_shards_are_one_byte_an_element(world_size, pool):
    common = [*EIGHT_LAYERS, *GATHER, "--parallelism.fsdp_single_shard=copy"]
    kept, not_kept = (
        plan([*common, f"--float8.keep_float8_shards={value}"], world_size).worst.by_pool[pool]
        for value in ("true", "false")
    )
    assert kept - not_kept == LINEARS // world_size
    by_default = plan(common, world_size).worst.by_pool[pool]
    assert by_default == (kept if world_size == 2 else not_kept)


def test_a_pipeline_keeps_whole_gradients():
    """Two stages of the debug model over two ranks: 1F1B keeps two forwards on the first, one on the last."""
    config = load(["--parallelism.pipeline_parallel_degree=2", *FORMER, *COMPILE], env={}).config
    layout = build_layout(config, 2)
    model = read_model(config, layout, "cuda")
    stages = build_stages(config, layout, model.n_layers)
    assert [(stage.layers, stage.in_flight) for stage in stages] == [((0, 1, 2), 2), ((3, 4, 5), 1)]
    first, last = plan_memory(config, model, layout, stages, Recompute("none"))
    memory = block_memory(config, model, layout)
    assert first.by_category["activations"] >= 2 * 3 * memory.saved("none")
    held = 3 * sum(p.local_numel for p in model.block) + model.vocabulary * 256
    assert first.by_category["gradients"] == 2 * 4 * held  # whole, and reduced
    assert first.by_category["logits and loss"] == 0
    assert last.by_category["logits and loss"] == 2 * 2048 * 2048 * 2


def test_a_hand_counted_step():
    """Two units of 100 and 10 elements over 2 ranks; the numbers are worked out in the comments."""
    found = replay(HAND_COUNTED)
    # main, after block's backward: 660 kept, gradients 200, and their copy in fp32; within it there were
    # gathered 200, gradients 200, head's copy 40, saved 70 and work 30, which is less.
    assert found.by_pool["main"] == WORKSPACE_BYTES + 660 + 200 + 400
    # gather, in forward: block's buffer 200 still there when head's shard (10), then its buffer (20) come.
    assert found.by_pool["gather"] == 200 + 20
    assert found.by_pool["reduce"] == 4 * (50 + 5)
    assert sum(found.by_category.values()) == found.reserved_bytes
    assert found.allocated_bytes < found.reserved_bytes


def test_one_rank_has_nothing_to_gather():
    found = plan([*FORMER, *EIGHT_LAYERS]).worst
    parameters, embedding = 2_795_573_248, 525_336_576
    assert found.by_category["parameters"] == 4 * parameters
    assert found.by_category["optimizer"] == 8 * parameters
    assert found.by_pool["gather"] == 0
    assert found.by_pool["reduce"] == 4 * parameters
    replicas = [*FORMER, *EIGHT_LAYERS, "--parallelism.data_parallel_replicate_degree=2"]
    assert plan(replicas, 2).worst.by_pool["reduce"] == 4 * parameters + 4 * embedding


REDUCE = "--parallelism.fsdp_reduce_scatter"
REDUCTIONS = ("torch", "compute_pool", "bfloat16_wire")
DDP = "--parallelism.data_parallel_replicate_degree=2"


def test_gradients_in_the_compute_pool():
    """The hand-counted step below, with its sums in the main pool, and then with bf16 on the wire."""
    pooled = replay(dataclasses.replace(HAND_COUNTED, reduction=Reduction(4, in_compute_pool=True)))
    # After block's backward: 660 kept, head's result 20; then block's gradients 200 and their copy 400.
    assert pooled.by_pool == {"main": WORKSPACE_BYTES + 660 + 20 + 200 + 400, "gather": 220, "reduce": 0}
    wire = replay(dataclasses.replace(HAND_COUNTED, reduction=Reduction(2, in_compute_pool=True)))
    # The copy is 200, and when its gradients are gone 200 are received and 200 are the result. In block's
    # backward: gathered 200, gradients 200, head's copy and what was received 40, saved 70, work 30.
    assert wire.by_pool == {"main": WORKSPACE_BYTES + 660 + 20 + 3 * 200, "gather": 220, "reduce": 0}


def test_memory_and_traffic_of_the_ways_to_reduce():
    """Two H200: what the reduce pool held goes into what activations leave; half as many bytes travel."""
    flags = [*WHOLE, *NONE, *COMPILE]
    plans = {how: plan([*flags, f"{REDUCE}={how}"], 2, "h200") for how in REDUCTIONS}
    parameters = 8_030_261_248
    assert plans["torch"].worst.by_pool["reduce"] == 4 * parameters // 2
    for how in ("compute_pool", "bfloat16_wire"):
        assert plans[how].worst.by_pool["reduce"] == 0
        less = plans["torch"].worst.reserved_bytes - plans[how].worst.reserved_bytes
        assert less > 0.75 * 4 * parameters // 2
    travelled = {
        how: next(t.bytes for t in found.traffic if t.kind == "reduce-scatter of gradients")
        for how, found in plans.items()
    }
    assert travelled == {"torch": 2 * parameters, "compute_pool": 2 * parameters, "bfloat16_wire": parameters}


def test_direct_weights_of_one_device():
    """Copies beside everything; gradients in bf16 until backward is over, then in fp32.

    An embedding has no copy, and weights that are gathered in float8 have one in float8.
    """
    parameters, direct = 2_795_573_248, "--parallelism.fsdp_single_shard=direct"
    # With long sequences the peak is at the loss, as where weights stay gathered until backward.
    found = plan([*EIGHT_LAYERS, direct]).worst
    pooled = plan([*EIGHT_LAYERS, f"{REDUCE}=compute_pool"]).worst
    assert found.by_category == pooled.by_category | {"gathered weights": 2 * (parameters - EMBEDDING)}
    flags = [*EIGHT_LAYERS, direct, "--optimizer.implementation=one_pass", "--model.converters=float8"]
    flags += ["--float8.filter_fqns=output", "--float8.cast_kernels=triton"]
    narrow = plan([*flags, "--float8.enable_fsdp_float8_all_gather"]).worst.by_category
    assert narrow["gathered weights"] == 2 * (EMBEDDING + NORMS) + LINEARS
    wide = plan([*flags, KEEP_TURNED]).worst.by_category
    assert wide["activations"] - narrow["activations"] == LINEARS  # turned for backward
    # With short ones it is at the end of the widening: the last unit, [norm, output], is there in both forms.
    short = plan([*EIGHT_LAYERS, direct, "--training.seq_len=256"]).worst
    both = 4 * parameters + 2 * (525_336_576 + 4096)
    kept = WORKSPACE_BYTES + 14 * parameters - 2 * EMBEDDING
    assert short.by_pool == {"main": kept + both, "gather": 0, "reduce": 0}


@pytest.mark.parametrize(
    "flags",
    [BF16, ["--training.enable_cpu_offload"], ["--training.global_batch_size=4", DDP]],
    ids=["cast", "offloaded", "replicas-accumulated"],
)
def test_sums_that_are_no_gradients_stay_in_the_reduce_pool(flags):
    """With the weights freed after forward in both, the pools are the same to the byte."""
    always = "--parallelism.fsdp_reshard_after_forward=always"
    ways = [plan([*EIGHT_LAYERS, *flags, always, f"{REDUCE}={how}"], 2).worst for how in REDUCTIONS[:2]]
    assert ways[0].by_pool == ways[1].by_pool
    assert ways[0].by_pool["reduce"] > 0


def test_layouts_divide_what_they_should():
    flags = [*FORMER, *WHOLE, *COMPILE]
    one = plan(flags).worst.by_category
    four = plan(flags, 4).worst.by_category
    split = plan([*flags, "--parallelism.tensor_parallel_degree=4"], 4).worst.by_category
    for category in ("parameters", "optimizer"):
        assert four[category] == one[category] / 4
        assert split[category] == pytest.approx(one[category] / 4, rel=0.001)  # norms are whole
    assert four["activations"] == one["activations"]
    assert split["activations"] < one["activations"] / 2.5
    assert split["logits and loss"] == one["logits and loss"] / 4


def test_recompute_orders_the_peaks():
    peaks = {
        option.recompute.describe(): option.worst.reserved_bytes
        for option in plan([*WHOLE, *COMPILE], 8).options
    }
    assert peaks["none"] > peaks["selective 8"] > peaks["selective 2"] > peaks["selective op"] > peaks["full"]


def test_accumulation_and_offload():
    one = plan([*WHOLE, *COMPILE], 8).worst
    twice = plan([*WHOLE, *COMPILE, "--training.global_batch_size=16"], 8).worst
    # The second backward adds to gradients that are there: room for one more unit.
    assert twice.by_pool["reduce"] - one.by_pool["reduce"] == 4 * (525_336_576 + 4096) // 8
    away = plan([*WHOLE, *COMPILE, "--training.enable_cpu_offload"], 8).worst
    assert away.host_bytes == 16 * 8_030_261_248 // 8
    assert away.by_category["optimizer"] == 0


def test_eager_losses_take_copies_in_fp32():
    compiled = plan([*FORMER, *WHOLE, *COMPILE], 2).worst
    eager = plan([*FORMER, *WHOLE], 2).worst
    logits = 8192 * 128256 * 2
    assert compiled.by_category["logits and loss"] == 2 * logits
    assert eager.by_category["logits and loss"] == 6 * logits


def test_a_fused_loss_writes_over_the_logits_and_chunks_keep_the_weights_gradient():
    def bytes_of_loss(*flags):
        config = load([*WHOLE, *COMPILE, *flags], env={}).config
        layout = build_layout(config, 2)
        model = read_model(config, layout, "cuda")
        (stage,) = build_stages(config, layout, model.n_layers)
        step = step_shape(config, model, layout, stage, Recompute("none"))
        kept = max(step.loss_saved_bytes - step.logits_bytes, 0)
        return step.logits_bytes + max(step.loss_forward_bytes, kept + step.loss_backward_bytes)

    logits, weight = 8192 * 128256 * 2, 128256 * 4096
    fused, batch = "--training.loss_kernel=fused", "--training.local_batch_size=4"
    assert bytes_of_loss(fused) == logits
    chunks = [fused, "--training.loss_chunk_tokens=2048"]
    # The sum in fp32, one chunk's own gradient in bf16 and its logits; whatever the batch is.
    assert bytes_of_loss(*chunks) == bytes_of_loss(*chunks, batch) == weight * (4 + 2) + logits // 4
    assert bytes_of_loss(fused, batch) == 4 * logits
    # Chunks so large that the compiled loss's own gradient of the logits is more than the weight's.
    assert bytes_of_loss("--training.loss_chunk_tokens=8192", batch) == weight * 4 + 2 * logits


def test_the_ledger_keeps_each_pools_own_peak():
    ledger = Ledger()
    ledger.alloc("activations", 10)
    ledger.free("activations", 10)
    ledger.alloc("gradients", 7, "reduce")
    ledger.touch("activations", 4)
    assert ledger.at_peak["main"].total() == 10
    assert ledger.at_peak["reduce"].total() == 7
    assert ledger.allocated_peak == 11
