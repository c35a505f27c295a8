"""FSDP2 over two gloo processes: mixed precision, the float8 all-gather, precomputed scales, plain state."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from converters.float8 import (
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from converters.float8.fsdp import FSDPFloat8Shard, GatherSettings
from converters.float8.gathered import GatheredFloat8
from converters.float8.scaling import cast_to_float8, scale_from_amax
from converters.float8.weight_scales import (
    amaxes_of_shards,
    gathered_in_float8,
    read_amaxes_of_changed_weights,
)
from parallelisms.direct_weights import DirectWeights
from tests.ranks import run_ranks
from trainer.optim.one_pass import OnePassAdamW

WORLD = 2
KERNELS = {"cast_kernels": "triton", "saved_input": "float8", "keep_float8_shards": True}


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
        for gather, precompute, fields in (
            (False, False, {}),
            (True, False, {}),
            (True, True, {}),
            (True, False, KERNELS),
            (True, True, KERNELS),
        ):
            model = build(Float8LinearConfig(enable_fsdp_float8_all_gather=gather, **fields))
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
        for n, norms, wire in (
            (64, torch.bfloat16, {torch.bfloat16}),
            (64, torch.float32, {torch.uint8}),
            (33, torch.bfloat16, {torch.uint8}),
            (1, torch.bfloat16, {torch.uint8}),
        ):
            assert_whole_weights_arrive(n, norms, wire)
        mixed = build(Float8LinearConfig.from_recipe_name("rowwise"))
        fully_shard(mixed, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        y = mixed(torch.randn(4, 32))
        assert y.dtype is torch.bfloat16
        y.float().sum().backward()
        assert mixed[0].weight.grad.dtype is torch.float32
    finally:
        dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Dtypes of what all-gathers are given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.c10d._allgather_base_.default:
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


def assert_whole_weights_arrive(n: int, norms: torch.dtype, wire: set[torch.dtype]) -> None:
    """(n, 32) float8 beside a norm that travels in `norms`; n = 33 and n = 1 shard unevenly."""
    torch.manual_seed(0)
    linear = nn.Linear(32, n, bias=False)
    model = nn.Sequential(nn.LayerNorm(32), linear)
    want, config = (
        linear.weight.detach().clone(),
        Float8LinearConfig(enable_fsdp_float8_all_gather=True, pad_inner_dim=True, keep_float8_shards=True),
    )
    model = fully_shard(
        convert_to_float8_training(model, config=config), mp_policy=MixedPrecisionPolicy(norms, torch.float32)
    )
    sent = Sent()
    for _ in range(2):
        with sent:
            model.unshard()
        scale = scale_from_amax(want.abs().amax(), torch.float8_e4m3fn)
        got = model[1].weight
        assert isinstance(got, GatheredFloat8)
        assert torch.equal(
            got._data.view(torch.uint8), cast_to_float8(want, scale, torch.float8_e4m3fn).view(torch.uint8)
        )
        assert got.dtype is norms
        model.reshard()
    assert sent.dtypes == wire, (n, norms)


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_ranks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, WORLD, str(Path(folder) / "rendezvous"))


def shard(settings: GatherSettings, *shape: int) -> FSDPFloat8Shard:
    return FSDPFloat8Shard(torch.randn(shape), settings)


@pytest.mark.parametrize("precomputed", [False, True])
def test_kept_shard_is_cast_again_when_the_weight_changes(precomputed: bool) -> None:
    one = shard(GatherSettings(torch.float8_e4m3fn, False, None, "triton", keep=True), 16, 32)
    if precomputed:
        one._scale = torch.tensor(3.0)
    data, scale = one.float8(None)
    assert torch.equal(data.float(), (one._tensor * scale).to(torch.float8_e4m3fn).float())
    again, same_scale = one.float8(None)
    assert again is data
    assert same_scale is scale

    def through_the_wrapper() -> None:
        torch.ops.aten.mul_.Scalar(one, 2)

    def past_the_wrapper() -> None:
        one._tensor.view(-1).mul_(2)

    def past_the_dispatcher() -> None:
        one._tensor.data.mul_(2)
        one._scale = None

    for write in (through_the_wrapper, past_the_wrapper, past_the_dispatcher):
        write()
        data, scale = one.float8(None)
        assert scale.item() == scale_from_amax(one._tensor.abs().max(), data.dtype).item()
        assert torch.equal(data.float(), (one._tensor * scale).to(torch.float8_e4m3fn).float())
        assert one.float8(None)[0] is data
    one._scale = torch.tensor(5.0)  # precomputed for the next step
    assert torch.equal(one.float8(None)[0].float(), (one._tensor * 5).clamp(-448, 448).to(data.dtype).float())


def test_a_shard_is_not_kept_unless_asked() -> None:
    one = shard(GatherSettings(torch.float8_e4m3fn, False), 16, 32)
    assert one.float8(None)[0] is not one.float8(None)[0]
    assert one._scale is None


def test_amaxes_of_all_shards_at_once() -> None:
    for kernels in ("torch", "triton"):
        settings = GatherSettings(torch.float8_e4m3fn, False, None, kernels)
        shards = [shard(settings, 8, 16), shard(settings, 0, 16), shard(settings, 1, 16)]
        shards[2]._tensor[0, 3] = float("nan")
        amaxes = amaxes_of_shards(shards)
        assert amaxes[:2].tolist() == [shards[0]._tensor.abs().max().item(), 0.0]
        assert amaxes[2].isnan()


def direct_worker(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=1)
    try:
        found = []
        for direct in (False, True):
            model = build(Float8LinearConfig(enable_fsdp_float8_all_gather=True))
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16 if direct else torch.float32)
            fully_shard(model, mp_policy=policy, reshard_after_forward=False)
            optimizer = OnePassAdamW(
                model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
            )
            weights = DirectWeights(model, torch.bfloat16) if direct else None
            if weights is not None:
                weights.attach(optimizer)
            found.append(list(three_steps(model, optimizer, weights)))
        assert found[0] == found[1]
        assert len(set(found[0])) == 3
    finally:
        dist.destroy_process_group()


def three_steps(model: nn.Module, optimizer: OnePassAdamW, weights: DirectWeights | None) -> Iterator[float]:
    """Losses; the optimizer finds amaxes, but for the second step, which is skipped."""
    gathered = gathered_in_float8(model)
    optimizer.amaxes.update({p: torch.zeros(()) for p in gathered})
    for step in range(3):
        read_amaxes_of_changed_weights(model, optimizer.amaxes)
        loss = (
            model(torch.randn(16, 32, generator=torch.Generator().manual_seed(step))).float().square().mean()
        )
        loss.backward()
        if weights is not None:
            weights.hand_over_gradients()
        optimizer.found_inf = torch.tensor(float(step == 1))
        optimizer.step()
        optimizer.zero_grad()
        precompute_float8_dynamic_scale_for_fsdp(model, optimizer.amaxes)
        for p in gathered:
            shard = p._local_tensor
            wanted = scale_from_amax(shard._tensor.abs().amax(), torch.float8_e4m3fn)
            assert torch.equal(shard._scale, wanted), step
            assert optimizer.amaxes[p] == shard._tensor.abs().amax()
        yield loss.item()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_one_rank_keeps_its_float8_weights_and_renews_them() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(direct_worker, 1, str(Path(folder) / "rendezvous"))
