"""Weights that are cast where they are copied to: the numbers of FSDP2's own casts, in one launch a unit.

Four processes; the reference is FSDP2 left alone.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from converters.float8 import Float8LinearConfig, convert_to_float8_training
from kernels.cast import cast_each_into
from parallelisms.fsdp import apply_fsdp
from parallelisms.uncast import UncastShard
from tests.parallelisms.test_fsdp import LAYERS, LAYOUTS, backward, build, gradients, of_four_ranks
from tests.parallelisms.test_fsdp_copies import shared_memory

CASES = {
    **{name: {"layout": layout} for name, layout in LAYOUTS.items()},
    "tied": {"layout": LAYOUTS["fsdp"], "tied": True},
    "kept": {"layout": LAYOUTS["fsdp"], "reshard": False},
    "copies": {"layout": LAYOUTS["fsdp"], "reshard": False, "transport": "copy_engine"},
}
GATHERS = {
    "fsdp": 2 * LAYERS + 2,
    "hsdp": 2 * LAYERS + 2,
    "fsdp_tp": 2 * LAYERS + 2,
    "ddp": 0,
    "tied": 2 * LAYERS + 1,
    "kept": LAYERS + 2,
    "copies": LAYERS + 2,
}
"""Of one step: blocks twice unless they are kept, the embedding and [norm, output] once."""


class Casts(TorchDispatchMode):
    """Tensors in each launch of ours, and passes of FSDP2's from one dtype to another."""

    def __init__(self):
        super().__init__()
        self.launches, self.passes = [], 0
        # What a tensor of a class of its own does within an operator is not shown to a mode.
        self._patch = mock.patch("parallelisms.uncast.cast_each_into", self._launch)

    def _launch(self, outs, tensors, scales, dtype):
        self.launches.append((len(tensors), dtype))
        cast_each_into(outs, tensors, scales, dtype)

    def __enter__(self):
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._foreach_copy_.default and not any(
            issubclass(t, UncastShard) for t in types
        ):
            self.passes += any(out.dtype != given.dtype for out, given in zip(*args[:2], strict=True))
        return func(*args, **(kwargs or {}))


def left_alone():
    """FSDP2 casts by itself."""
    return mock.patch("parallelisms.fsdp.cast_when_copied")


def train(folder, layout, **options):
    """Gradients of three steps, between which weights are updated and loaded; casts of the last step."""
    with shared_memory(folder):
        model, _ = build(layout, "bfloat16_wire", **options)
    found = []
    for step in range(3):
        with Casts() as casts:
            backward(model, 1, step)
        found.append(gradients(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().sub_(parameter.grad.to_local(), alpha=0.1)
        model.zero_grad()
        if step == 1:  # into tensors that FSDP2 has not seen before
            state = {name: value.clone() * 0.5 for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
    held = [p.to_local().data for p in model.parameters()]
    assert all(type(shard) is torch.Tensor and not vars(shard) for shard in held)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return found, casts.launches, casts.passes


class Block(nn.Module):
    """A norm, whose weight travels in bf16, and two linears, whose travel in float8."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def float8(rows_kept, norms):
    """Losses of three steps of two float8 blocks, and the launches of the last."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleDict({str(i): Block() for i in range(2)})
    config = Float8LinearConfig(
        enable_fsdp_float8_all_gather=True,
        emulate=True,
        cast_kernels="triton",
        keep_float8_shards=rows_kept,
    )
    model = convert_to_float8_training(model, config=config)
    apply_fsdp(
        model,
        "layers",
        {},
        init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",)),
        param_dtype=norms,
        reduce_dtype=torch.float32,
        reshard_after_forward=True,
        cpu_offload=False,
    )
    losses = []
    for step in range(3):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        with Casts() as casts:
            for block in model.layers.values():
                x = block(x)
            loss = x.float().square().mean()
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
        model.zero_grad()
        losses.append(loss.item())
    return losses, casts.launches, casts.passes


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    found = {}
    for how in (nullcontext, left_alone):
        with how():
            for name, case in CASES.items():
                found[name, how.__name__] = train(f"{folder}/{name}-{how.__name__}", **case)
            for kept in (False, True):
                for norms in (torch.bfloat16, torch.float32):
                    found[kept, norms, how.__name__] = float8(kept, norms)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """What each of four ranks found."""
    return of_four_ranks(worker)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_fsdps_own_casts(ranks, case):
    """Bit for bit, uneven shards among them, and after weights were loaded."""
    for found in ranks:
        got, want = (found[case, how][0] for how in ("nullcontext", "left_alone"))
        for mine, theirs in zip(got, want, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[fqn], theirs[fqn]) for fqn in theirs)
        assert not all(torch.equal(want[1][fqn], want[2][fqn]) for fqn in want[1])


@pytest.mark.parametrize("case", CASES)
def test_a_unit_is_cast_in_one_launch(ranks, case):
    for found in ranks:
        _, launches, passes = found[case, "nullcontext"]
        assert (len(launches), passes) == (GATHERS[case], 0)
        assert {dtype for _, dtype in launches} <= {torch.bfloat16}
        blocks = [tensors for tensors, _ in launches if tensors > 3]
        assert blocks == [9] * (len(launches) - (2 if case != "tied" else 1) if launches else 0)
        _, launches, passes = found[case, "left_alone"]
        assert (len(launches), passes) == (0, GATHERS[case])


@pytest.mark.parametrize("norms", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [False, True])
def test_a_float8_unit_takes_two_launches(ranks, kept, norms):
    """Of its norm and its linears; kept linears were cast before, and a norm may travel as it is."""
    for found in ranks:
        losses, launches, passes = found[kept, norms, "nullcontext"]
        assert losses == found[kept, norms, "left_alone"][0]
        assert len(set(losses)) == 3
        wanted = [] if kept else [(2, torch.float8_e4m3fn)]
        if norms is torch.bfloat16:
            wanted.append((1, torch.bfloat16))
        assert sorted(launches, key=str) == sorted(4 * wanted, key=str)
        assert passes == 0


def test_an_uncast_shard_is_cast_wherever_it_is_read():
    source = torch.randn(3, 10)
    shard = UncastShard(source, torch.bfloat16)
    assert (shard.shape, shard.dtype) == ((30,), torch.bfloat16)
    assert shard.view(-1) is shard
    want = source.view(-1).bfloat16()
    assert torch.equal(shard.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(shard + 1, want + 1)
    for dtype in (torch.bfloat16, torch.float32):  # rounded on the way
        assert torch.equal(torch.empty(30, dtype=dtype).copy_(shard), want.to(dtype))
    assert repr(shard) == "UncastShard((30,), torch.bfloat16)"
