"""What a dry run's collectives would move is what the plan says, to the byte."""

import pytest
import torch

from parallelisms.distributed import Rank
from trainer.config.load import load
from trainer.dry_run import dry_run
from trainer.metrics.devices import DEVICES
from trainer.plan.plan import make_plan

H100 = next(device for device in DEVICES if device.key == "h100")
COMMON = ("--training.local_batch_size=1", "--training.seq_len=128", "--activation_checkpoint.mode=none")
TP4 = "--parallelism.tensor_parallel_degree=4"
FULL = "--activation_checkpoint.mode=full"
PER_OP = ("--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op")
FLOAT8 = ("--model.converters=float8", "--float8.filter_fqns=output")
# Its scales come one by one: a first step has none from the step before.
GATHER = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
ACCUMULATE = "--training.global_batch_size=32"
WIRE = "--parallelism.fsdp_reduce_scatter=bfloat16_wire"
WIDE = "--parallelism.fsdp_reduce_scatter=torch"  # `auto` depends on the device, and a dry run has none


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (512, (TP4, FULL)),
        (16, (TP4, *PER_OP)),
        (16, (TP4, FULL, *FLOAT8)),
        (16, (*FLOAT8, GATHER)),
        (16, ("--parallelism.data_parallel_replicate_degree=4", ACCUMULATE)),
        (16, ("--model.overrides.tied_output", "--parallelism.fsdp_reshard_after_forward=never")),
        (
            16,
            ("--parallelism.data_parallel_replicate_degree=4", WIRE),
        ),
    ],
    ids=["fsdp128xtp4", "op", "float8-tp", "float8-gather", "hsdp-accumulated", "tied-never", "bf16-wire"],
)
def test_counted_bytes_are_the_planned_ones(world_size, flags):
    loaded = load([*COMMON, *([] if WIRE in flags else [WIDE]), *flags], env={})
    found = dry_run(loaded, Rank(0, 0, world_size, torch.device("cpu")))
    plan = make_plan(loaded, world_size, H100)
    assert found.parameters == sum(
        parameter.shard_numel * (plan.model.n_layers if parameter in plan.model.block else 1)
        for parameter in (*plan.model.embedding, *plan.model.block, *plan.model.head)
    )
    moved = dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all", "all_reduce"), 0)
    calls = dict(moved)
    for (kind, _), count in found.collectives.calls.items():
        calls[kind] += count
    for (kind, _), size in found.collectives.bytes.items():
        moved[kind] += size
    planned = {item.kind: item for item in plan.traffic}

    def total(*kinds, what="bytes"):
        return sum(getattr(planned[kind], what) for kind in kinds if kind in planned)

    sharded = ("all-gather of weights", "reduce-scatter of gradients", "tensor parallel")
    kinds = ("all_gather", "reduce_scatter", "all_to_all")  # the last one where gradients travel in bf16
    assert sum(moved[kind] for kind in kinds) == total(*sharded)
    assert sum(calls[kind] for kind in kinds) == total(*sharded, what="calls")
    if not {*FLOAT8} & {*flags}:  # float8's scales are all-reduces too
        sums = total("all-reduce over replicas", "tensor-parallel sums")
        axes = sum(ranks > 1 for ranks in (plan.layout.fsdp_degree, plan.layout.tp))
        norm = moved["all_reduce"] - sums  # of the gradients, not planned: an fp64 number, an axis or all
        assert 0 < norm <= 2 * 8 * axes


@pytest.mark.parametrize("rank", [0, 63])
def test_stages_pass_each_micro_batch_on(rank):
    """First and last stage of 2: four micro-batches forward, their gradients back, and one vote to begin."""
    flags = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.context_parallel_degree=2"]
    loaded = load([*COMMON, *flags, "--training.local_batch_size=4"], env={})
    config = loaded.config
    found = dry_run(loaded, Rank(rank, 0, 64, torch.device("cpu")))
    hidden = 2 * (config.training.seq_len // 2) * 256  # bytes in bf16: this rank's positions of one sequence
    for kind in ("send", "receive"):
        moved = sum(count for (found_kind, _), count in found.collectives.calls.items() if found_kind == kind)
        assert moved in (4, 5)
        size = sum(size for (found_kind, _), size in found.collectives.bytes.items() if found_kind == kind)
        assert size == pytest.approx(4 * hidden / 2, rel=0.01)


def test_the_launcher_starts_one_process_for_all(train):
    run = train("--comm.mode=fake_backend", TP4, "--training.global_batch_size=-1", ngpu=64)
    assert run.code == 0, run.err
    assert "mesh: dp_shard 16 x tp 4" in run.out
    assert "dry run: rank 0 of 64 took one step" in run.out
    assert not run.folder.exists()


def test_what_does_not_fit_together_fails_as_in_a_run(train):
    run = train("--comm.mode=fake_backend", "--parallelism.tensor_parallel_degree=3", ngpu=6)
    assert run.code == 2
    assert "3 does not divide n_heads" in run.err
