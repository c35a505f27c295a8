"""FSDP2 by copies between ranks: what weights and gradients become, and what no longer travels or is copied.

Four processes of a CPU share files in place of GPUs that share memory.
"""

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from converters.float8 import (
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from converters.float8.fsdp import _PASSES_AS_BF16
from parallelisms import fsdp_copies
from parallelisms.fsdp import apply_fsdp
from parallelisms.peer_memory import bytes_held, reach_each_other
from tests.parallelisms.shared_memory import SharedMemory
from tests.parallelisms.test_fsdp import LAYERS, LAYOUTS, Traffic, backward, build, gradients, of_four_ranks

COPIED = [name for name, (_, shards, _) in LAYOUTS.items() if shards > 1]
UNITS = LAYERS + 2


class Copies(TorchDispatchMode):
    """Calls of the operators with which FSDP2 copies into and out of its buffers, where those are buffers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fsdp" and not any(issubclass(t, fsdp_copies.Placeholder) for t in types):
            self.calls.append(func._schema.name.removeprefix("fsdp::"))
        return func(*args, **(kwargs or {}))


@contextmanager
def shared_memory(folder):
    """FSDP's peer memory is files in `folder`; a list of what was made."""
    memory = []

    def shared(mesh, pieces=1):
        group = mesh.get_group(mesh.ndim - 1)
        place = Path(folder) / f"{len(memory)}-{group.group_name}"
        place.mkdir(parents=True, exist_ok=True)
        memory.append(SharedMemory(group, place, pieces))
        return memory[-1]

    with mock.patch("parallelisms.fsdp.peer_memory", shared):
        yield memory


def three_steps(layout, transport, folder, *, micro_batches=1, **options):
    """Gradients of three steps with updates between; collectives and copies of the second."""
    with shared_memory(folder) as memory:
        accumulates = micro_batches > 1
        model, note = build(layout, "bfloat16_wire", transport=transport, accumulates=accumulates, **options)
    assert note.endswith("in bf16 by copies between GPUs") == (transport == "copy_engine")
    found = []
    for step in range(3):
        with Traffic() as traffic, Copies() as copies:
            backward(model, micro_batches, step)
        found.append(gradients(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().sub_(parameter.grad.to_local(), alpha=0.1)
        model.zero_grad()
        if step == 1:
            counts = dict(traffic.calls), list(copies.calls)
    return found, *counts, sum(each.made for each in memory)


class Stack(nn.Module):
    """Blocks of a linear each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(64, 64, bias=False) for i in range(3)})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def float8_losses(transport, folder):
    """Of three steps of weights that travel in float8."""
    torch.manual_seed(0)
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    model = convert_to_float8_training(Stack(), config=config)
    with shared_memory(folder):
        apply_fsdp(
            model,
            "layers",
            {},
            init_device_mesh("cpu", (4,), mesh_dim_names=("dp_shard",)),
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            reshard_after_forward=False,
            cpu_offload=False,
            reduce_scatter="bfloat16_wire",
            transport=transport,
        )
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        loss = model(torch.randn(16, 64)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        precompute_float8_dynamic_scale_for_fsdp(model)
        losses.append(loss.item())
    return losses


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    cases = {(name, reshard): {"reshard": reshard} for name in COPIED for reshard in (False, True)}
    cases["fsdp", "accumulated"] = {"reshard": False, "micro_batches": 2}
    cases["hsdp", "accumulated"] = {"reshard": False, "micro_batches": 2}
    cases["fsdp", "tied"] = {"reshard": False, "tied": True}
    found = {}
    for (name, case), options in cases.items():
        for transport in ("nccl", "copy_engine"):
            place = f"{folder}/{name}-{case}"
            found[name, case, transport] = three_steps(LAYOUTS[name], transport, place, **options)
    held = bytes_held()
    float8 = {}
    for seen_as, formats in (("bf16", _PASSES_AS_BF16), ("bytes", ())):
        with mock.patch("converters.float8.fsdp._PASSES_AS_BF16", formats):
            for transport in ("nccl", "copy_engine"):
                float8[seen_as, transport] = float8_losses(transport, f"{folder}/float8-{seen_as}")
    torch.save((found, held, float8), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """What each of four ranks found."""
    return of_four_ranks(worker)


def test_gradients_are_those_of_an_all_to_all(ranks):
    """Bit for bit, step by step, with weights that change between them."""
    for found, *_ in ranks:
        for (name, case, transport), (got, *_) in found.items():
            want = found[name, case, "nccl"][0]
            for mine, theirs in zip(got, want, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[fqn], theirs[fqn]) for fqn in theirs), (name, case, transport)
            assert not all(torch.equal(want[0][fqn], want[2][fqn]) for fqn in want[0])


def test_nothing_is_gathered_exchanged_or_copied_twice(ranks):
    for found, *_ in ranks:
        for name, case in {key[:2] for key in found}:
            _, calls, copies, _ = found[name, case, "nccl"]
            assert calls["alltoall_base"] > 0
            assert {"chunk_cat", "split_with_sizes_copy"} <= set(copies)
            _, calls, copies, _ = found[name, case, "copy_engine"]
            assert "alltoall_base" not in calls
            assert "chunk_cat" not in copies
            if case is not True:
                assert "allgather_base" not in calls
                assert not copies
            elif name == "fsdp":
                assert calls["allgather_base"] == 2 * LAYERS + 1 + 1


def test_memory_is_made_once(ranks):
    """A piece for sums, two for gathers: the sizes are as good as equal here."""
    for found, held, _ in ranks:
        assert {key: result[3] for key, result in found.items() if key[2] == "copy_engine"} == {
            key: 1 if key[1] is True else 3 for key in found if key[2] == "copy_engine"
        }
        assert held == 16 * 2**20 * sum(result[3] for result in found.values())


def test_float8_weights_are_gathered_by_copies(ranks):
    for *_, float8 in ranks:
        for seen_as in ("bf16", "bytes"):
            losses = float8[seen_as, "copy_engine"]
            assert losses == float8[seen_as, "nccl"]
            assert len(set(losses)) == 3


def test_processes_of_a_cpu_do_not_reach_each_other():
    assert not reach_each_other(torch.device("cpu"), 2)


def test_a_placeholder_is_nothing_but_its_shape():
    buffer = fsdp_copies.UncopiedGradients((12,), torch.bfloat16, torch.device("cpu"))
    assert buffer.view(4, -1).shape == (4, 3)
    assert buffer.view(4, -1).whole is buffer
    with pytest.raises(RuntimeError, match=r"mul.* of UncopiedGradients, which stands for a buffer"):
        buffer * 2
