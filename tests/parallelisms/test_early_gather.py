"""The embedding is gathered before forward begins, once a step, and is what the optimizer has left."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallelisms.early_gather import gather_embedding_early
from tests.parallelisms.test_fsdp import LAYOUTS, Traffic, backward, build, of_four_ranks
from trainer.optim.one_pass import OnePassAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def train(layout, early, *, micro_batches=1, writes=False, tied=False):
    """Weights after three steps, who gathered the embedding in each, and all-gathers of the last."""
    model, _ = build(layout, "bfloat16_wire", accumulates=micro_batches > 1, tied=tied)
    optimizer = OnePassAdamW(model.parameters(), **SETTINGS)
    promised = early and gather_embedding_early(model, optimizer)
    gathered = []
    embedding = model.tok_embeddings
    if isinstance(embedding, FSDPModule):
        real = embedding.unshard
        embedding.unshard = lambda **options: gathered.append(step) or real(**options)
    for step in range(3):
        with Traffic() as traffic:
            backward(model, micro_batches, step)
        optimizer.step()
        optimizer.zero_grad()
        if writes and step == 0:
            with torch.no_grad():
                embedding.weight.to_local().mul_(0.5)
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


def test_the_embedding_is_gathered_after_each_step_unless_it_was_written_since(ranks):
    for found in ranks:
        early = {name: result[1][:2] for name, result in found.items()}
        assert early == {
            "fsdp": (True, [1, 2]),
            "hsdp": (True, [1, 2]),
            "ddp": (False, []),  # one shard: nothing is gathered
            "fsdp_tp": (True, [1, 2]),
            "accumulated": (True, [1, 2]),
            "written": (True, [2]),
            "tied": (True, [1, 2]),
        }


def test_other_optimizers_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    assert not gather_embedding_early(model, torch.optim.AdamW(model.parameters()))
    assert not gather_embedding_early(model, OnePassAdamW(model.parameters(), **SETTINGS))
