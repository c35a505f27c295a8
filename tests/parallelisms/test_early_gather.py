"""What forward reads first is gathered before it begins, once a step, as the optimizer has left it."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallelisms.early_gather import gather_early
from tests.parallelisms.test_fsdp import CONFIG, LAYOUTS, SPEC, Traffic, backward, build, of_four_ranks
from trainer.optim.one_pass import OnePassAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def train(layout, early, *, micro_batches=1, writes=False, tied=False):
    """Weights after three steps, what was gathered early in each, and all-gathers of the last."""
    model, _ = build(layout, "bfloat16_wire", accumulates=micro_batches > 1, tied=tied)
    optimizer = OnePassAdamW(model.parameters(), **SETTINGS)
    promised = early and gather_early(model, SPEC.blocks, optimizer)
    gathered = []
    embedding, block = model.tok_embeddings, model.layers["0"]
    for name, unit in ("embedding", embedding), ("block", block):
        if isinstance(unit, FSDPModule):
            real = unit.unshard
            unit.unshard = lambda name=name, real=real, **o: gathered.append((name, step)) or real(**o)
    for step in range(3):
        with Traffic() as traffic:
            backward(model, micro_batches, step)
        optimizer.step()
        optimizer.zero_grad()
        if writes and step == 0:
            with torch.no_grad():
                block.attention_norm.weight.to_local().mul_(0.5)
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return promised, gathered, traffic.calls["allgather_base"], [w.detach().clone() for w in weights]


CASES = {
    **{name: {"layout": layout} for name, layout in LAYOUTS.items()},
    "accumulated": {"layout": LAYOUTS["fsdp"], "micro_batches": 2},
    "written": {"layout": LAYOUTS["fsdp"], "writes": True},
    "tied": {"layout": LAYOUTS["fsdp"], "tied": True},
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    torch.save(
        {name: [train(early=early, **case) for early in (False, True)] for name, case in CASES.items()},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """What each of four ranks found."""
    return of_four_ranks(worker)


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(ranks, case):
    for found in ranks:
        (_, nobody, calls, want), (_, _, early_calls, got) = found[case]
        assert nobody == []
        assert early_calls == calls
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want, strict=True))


def test_units_are_gathered_after_each_step_unless_they_were_written_since(ranks):
    for found in ranks:
        early = {name: result[1][:2] for name, result in found.items()}
        second, third = ([(name, step) for name in ("embedding", "block")] for step in (1, 2))
        assert early == {
            "fsdp": (True, second + third),
            "hsdp": (True, second + third),
            "ddp": (False, []),  # one shard: nothing is gathered
            "fsdp_tp": (True, second + third),
            "accumulated": (True, second + third),
            "written": (True, third),
            "tied": (True, second + third),
        }


def test_a_model_that_is_not_sharded_is_left_alone():
    model = SPEC.build(CONFIG)
    assert not gather_early(model, SPEC.blocks, OnePassAdamW(model.parameters(), **SETTINGS))
