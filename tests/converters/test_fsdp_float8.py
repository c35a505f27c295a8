"""FSDP2 over two gloo processes: mixed precision, the float8 all-gather, precomputed scales, plain state."""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from converters.float8 import (
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from converters.float8.fsdp import FSDPFloat8Shard, GatheredFloat8

WORLD = 2


def build(config: Float8LinearConfig) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    return convert_to_float8_training(model, config=config)


def train(model: nn.Module, precompute: bool) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        if precompute:
            precompute_float8_dynamic_scale_for_fsdp(model)
        losses.append(loss.detach())
    return losses


def worker(rank: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        want = train(build(Float8LinearConfig()), precompute=False)
        for gather, precompute in ((False, False), (True, False), (True, True)):
            model = build(Float8LinearConfig(enable_fsdp_float8_all_gather=gather))
            for layer in (model[0], model[2]):
                fully_shard(layer)
            fully_shard(model)
            assert isinstance(model[0].weight.to_local(), FSDPFloat8Shard) is gather
            model[0].unshard()
            assert isinstance(model[0].weight, GatheredFloat8) is gather
            model[0].reshard()
            got = train(model, precompute)
            # Every rank sees the same batch, so sharding changes nothing but the order of sums.
            torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-5, atol=1e-6)
            state = model.state_dict()
            assert sorted(state) == ["0.bias", "0.weight", "2.bias", "2.weight"]
            for value in state.values():
                assert isinstance(value, DTensor)
                assert type(value.to_local()) is torch.Tensor
            before = model(torch.ones(2, 32)).detach()
            saved = {k: v.clone() for k, v in state.items()}
            with torch.no_grad():
                model.load_state_dict({k: v * 100 for k, v in saved.items()})
                assert not torch.allclose(model(torch.ones(2, 32)), before)
                model.load_state_dict(saved)
                assert torch.equal(model(torch.ones(2, 32)), before)
        mixed = build(Float8LinearConfig.from_recipe_name("rowwise"))
        fully_shard(mixed, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        y = mixed(torch.randn(4, 32))
        assert y.dtype is torch.bfloat16
        y.float().sum().backward()
        assert mixed[0].weight.grad.dtype is torch.float32
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(str(Path(folder) / "rendezvous"),), nprocs=WORLD)
