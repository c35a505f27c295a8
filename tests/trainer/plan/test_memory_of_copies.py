"""Copies between GPUs: what the planned peak has of them, against sums done by hand."""

import dataclasses

import pytest

from tests.trainer.plan.runs import COPIES, EIGHT_LAYERS, HAND_COUNTED, NCCL, NEVER, ONE_PASS, WIRE, plan
from trainer.plan.memory import WORKSPACE_BYTES, Reduction, replay


def test_a_hand_counted_step_with_copies_between_gpus():
    """A step with weights that are never resharded, gradients in bf16, by all-to-all and by copies."""
    units = tuple(dataclasses.replace(unit, stays=True) for unit in HAND_COUNTED.units)
    never = dataclasses.replace(HAND_COUNTED, units=units, reduction=Reduction(2, in_compute_pool=True))
    # At the end of backward, weights freed: 660 kept, head's result 20; block's input, received and result.
    assert replay(never).by_pool == {"main": WORKSPACE_BYTES + 660 + 20 + 3 * 200, "gather": 220, "reduce": 0}
    reduction = dataclasses.replace(never.reduction, peer_bytes=1000)
    # Where weights are gathered by NCCL: no input, but the gradients 200 themselves; nothing received.
    gradients = dataclasses.replace(never, reduction=reduction)
    # Most is in block's backward: gathered 200, saved 70, work 30, gradients 200; head's 20, its sum 20.
    within = 660 + 200 + 70 + 30 + 200 + 20 + 20
    found = replay(gradients)
    assert found.by_pool == {"main": WORKSPACE_BYTES + within, "gather": 220, "reduce": 0, "peer": 1000}
    # Weights 220 are there to the end: then head's result 20, block's gradients 200 and result 200. Buffers
    # were there once, block's 200 and head's 20; shards are cast into peer memory.
    found = replay(dataclasses.replace(gradients, peer_weight_bytes=500))
    pools = {"main": WORKSPACE_BYTES + 660 + 220 + 20 + 200 + 200, "gather": 0, "reduce": 0}
    assert found.by_pool == pools | {"arrival": 220, "peer": 1000 + 500}
    assert found.by_category["gathered weights"] == 220 + 220 + 500
    assert found.by_category["gradient buffers"] == 200 + 1000
    assert sum(found.by_category.values()) == found.reserved_bytes


def test_peer_memory_is_as_large_as_the_largest_unit():
    """Rounded up to 16 MiB; the traffic is the same."""
    mib = 2**20
    flags = [*EIGHT_LAYERS, WIRE, ONE_PASS]
    for again in ([], ["--training.global_batch_size=4"]):
        nccl, copies = (plan([*flags, NEVER, how, *again], 2) for how in (NCCL, COPIES))
        # [norm, output] has 1002.01 MiB of gradients; it and the embedding have shards of 501, in two pieces.
        assert copies.worst.by_pool["peer"] == (1008 + 2 * 512) * mib
        assert copies.worst.by_pool["arrival"] == nccl.worst.by_pool["gather"]
        assert copies.worst.by_pool["gather"] == 0
        assert copies.worst.by_pool["reduce"] == nccl.worst.by_pool["reduce"]
        assert copies.traffic == nccl.traffic
    # Weights that are freed after forward are NCCL's to gather.
    always = "--parallelism.fsdp_reshard_after_forward=always"
    nccl, copies = (plan([*flags, always, how], 2).worst.by_pool for how in (NCCL, COPIES))
    assert copies["peer"] == 1008 * mib
    assert copies["gather"] == nccl["gather"]
    assert copies.keys() - nccl.keys() == {"peer"}
    assert plan([*flags, COPIES]).worst.by_pool.keys() == {"main", "gather", "reduce"}  # of one shard


@pytest.mark.parametrize(("layers", "second"), [(15, 64), (16, 256)])
def test_units_take_pieces_in_turn(layers, second):
    """A tied embedding is the first unit; of an even number of units it never has the second piece."""
    config = ["--job.config_file=train_configs/llama3_1b.toml", f"--model.overrides.n_layers={layers}"]
    found = plan([*config, WIRE, NEVER, COPIES], 2).worst.by_pool["peer"]
    # In MiB: the embedding's gradients are 501, its shards 250.5, a block's 58.
    assert found == (512 + 256 + second) * 2**20
