"""Gradients of FSDP2 under each `fsdp_reduce_scatter`: what they are, what travels, what shares memory.

Every rank has batches of its own; the reference is torch's own reduction over the same mesh.
"""

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import MODELS
from parallelisms import fsdp_comm
from parallelisms.fsdp import apply_fsdp, set_replica_all_reduce
from parallelisms.tensor_parallel import apply_tensor_parallel
from tests.ranks import run_ranks
from trainer.loss import cross_entropy_sum

SPEC = MODELS["llama3"]
LAYERS, VOCAB, SEQ = 2, 102, 16  # 102 rows are uneven over 4 shards, and over 2 of a half
CONFIG = dataclasses.replace(
    SPEC.flavors["debugmodel"],
    n_layers=LAYERS,
    dim=40,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=VOCAB,
    max_seq_len=SEQ,
)
LAYOUTS = {"fsdp": (1, 4, 1), "hsdp": (2, 2, 1), "ddp": (4, 1, 1), "fsdp_tp": (1, 2, 2)}
"""Name -> (dp_replicate, dp_shard, tp) of four processes."""


class Traffic(TorchDispatchMode):
    """Calls of collectives, and bytes given to them by dtype."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::").strip("_")
            given = args[1] if isinstance(args[1], torch.Tensor) else args[0][0]
            self.calls[kind] += 1
            self.bytes[kind, str(given.dtype).removeprefix("torch.")] += given.nbytes
        return func(*args, **(kwargs or {}))


def build(
    layout,
    reduce_scatter,
    *,
    accumulates=False,
    tied=False,
    reshard=True,
    reduce_dtype=torch.float32,
    gathers_embedding=True,
    transport="nccl",
):
    """The model computes in bf16."""
    with torch.device("meta"):
        model = SPEC.build(dataclasses.replace(CONFIG, tied_output=tied))
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    apply_tensor_parallel(model, SPEC.roles, mesh["tp"])
    note = apply_fsdp(
        model,
        SPEC.blocks,
        SPEC.roles,
        mesh["dp_replicate", "dp_shard"] if layout[0] > 1 else mesh["dp_shard"],
        param_dtype=torch.bfloat16,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard,
        cpu_offload=False,
        reduce_scatter=reduce_scatter,
        accumulates=accumulates,
        gathers_embedding=gathers_embedding,
        transport=transport,
    )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model, note


def backward(model, micro_batches, step=0):
    """Leaves the gradients of a step; every rank's tokens are its own."""
    for index in range(micro_batches):
        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + 10 * step + index)
        tokens = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
        set_replica_all_reduce(model, index == micro_batches - 1)
        (cross_entropy_sum(model(tokens), tokens.roll(-1, 1)) / tokens.numel()).backward()


def gradients(model):
    found = {name: p.grad.to_local().clone() for name, p in model.named_parameters()}
    assert all(grad.dtype == torch.float32 for grad in found.values())
    return found


def two_steps(layout, reduce_scatter, micro_batches):
    """Gradients of two steps without an update, and what the first one sent."""
    model, note = build(layout, reduce_scatter, accumulates=micro_batches > 1)
    found = []
    for step in range(2):
        with Traffic() as traffic:
            backward(model, micro_batches, step)
        found.append(gradients(model))
        model.zero_grad()
        if step == 0:
            first = traffic
    return found, dict(first.calls), dict(first.bytes), note


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    found = {
        (name, how, micro_batches): two_steps(layout, how, micro_batches)
        for name, layout in LAYOUTS.items()
        for how in ("torch", "compute_pool", "bfloat16_wire")
        for micro_batches in (1, 2)
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def of_four_ranks(function):
    """What function(rank, folder) saved to ``folder/RANK.pt`` in each of four processes."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(function, 4, folder)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def ranks():
    """What each of four ranks found."""
    return of_four_ranks(worker)


def worst(got, want):
    """The largest difference over two steps, relative to a gradient's largest element."""
    return max(
        float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-30))
        for a, b in zip(got, want, strict=True)
        for name in b
        if b[name].numel()
    )


def test_gradients_are_those_of_torchs_reduction(ranks):
    """Bit for bit over two shards, however they accumulate; over four the sums have another order."""
    for found in ranks:
        for (name, how, micro_batches), (got, *_) in found.items():
            want = found[name, "torch", micro_batches][0]
            exact = how != "bfloat16_wire" or LAYOUTS[name][1] <= 2
            assert worst(got, want) <= (0 if exact else 3e-7), (name, how, micro_batches)
            assert any(grad.abs().max() > 0 for grad in got[1].values() if grad.numel())


def test_half_as_many_bytes_travel(ranks):
    for name, (_, shards, _) in LAYOUTS.items():
        for found in ranks:
            _, calls, sent, _ = found[name, "torch", 1]
            _, calls_16, sent_16, note = found[name, "bfloat16_wire", 1]
            if shards == 1:
                assert sent_16 == sent
                assert note.endswith("in the compute pool (of one shard nothing travels)")
                continue
            assert note.endswith("gradients summed in fp32 after travelling in bf16")
            assert calls["reduce_scatter_base"] == calls_16["alltoall_base"] == LAYERS + 2
            assert "reduce_scatter_base" not in calls_16
            fp32 = sent["reduce_scatter_base", "float32"]
            assert sent_16["alltoall_base", "bfloat16"] * 2 == fp32 > 0


def test_an_untied_embedding_is_gathered_once(ranks):
    """Blocks twice, [norm, output] once."""
    for name, (_, shards, tp) in LAYOUTS.items():
        if shards > 1 and tp == 1:
            assert ranks[0][name, "torch", 1][1]["allgather_base"] == 2 * LAYERS + 1 + 1


@pytest.fixture
def alone():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_one_shards_sums_are_its_inputs(alone, monkeypatch, tied):
    """The gradients lie in the buffers that they were copied into; a second micro-batch has its own."""
    buffers = []
    allocate = fsdp_comm.GradientReduceScatter.allocate

    def recorded(self, *args, **options):
        buffers.append(allocate(self, *args, **options))
        return buffers[-1]

    monkeypatch.setattr(fsdp_comm.GradientReduceScatter, "allocate", recorded)
    units = LAYERS + (1 if tied else 2)
    want, _ = build((1, 1, 1), "torch", tied=tied)
    model, _ = build((1, 1, 1), "compute_pool", tied=tied, reshard=False)
    for micro_batches in (1, 2, 1):
        buffers.clear()
        backward(model, micro_batches)
        backward(want, micro_batches)
        pairs = list(zip(buffers[::2], buffers[1::2], strict=True))
        assert len(pairs) == units * micro_batches
        assert all(given is result for given, result in pairs[:units])
        assert not any(given is result for given, result in pairs[units:])
        storages = {given.untyped_storage().data_ptr() for given, _ in pairs[:units]}
        assert {p.grad.to_local().untyped_storage().data_ptr() for p in model.parameters()} == storages
        assert worst([gradients(model)], [gradients(want)]) == 0
        model.zero_grad()
        want.zero_grad()


def test_sums_of_another_dtype_are_no_gradients(alone):
    """bf16 parameters: the fp32 sum is cast and dropped, so nothing may share its memory."""
    model, _ = build((1, 1, 1), "compute_pool")
    model.to(torch.bfloat16)
    unit = fsdp_comm.GradientReduceScatter([model], shards=1, temporary=False)
    given = unit.allocate((8,), dtype=torch.float32, device=torch.device("cpu"))
    result = unit.allocate((8,), dtype=torch.float32, device=torch.device("cpu"))
    assert given is not result
    backward(model, 1)
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_wire_of_another_dtype_is_refused(alone):
    unit = fsdp_comm.GradientReduceScatter([], shards=2, temporary=False, wire_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"float32 are to be reduced, torch\.bfloat16 was to travel"):
        unit.allocate((8,), dtype=torch.float32, device=torch.device("cpu"))
