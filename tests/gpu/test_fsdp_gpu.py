"""Memory pools, streams and the wire of FSDP2's reduction, on real streams; direct weights on one GPU."""

import gc
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from converters.float8 import (
    Float8LinearConfig,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from converters.float8.fsdp import _PASSES_AS_BF16
from parallelisms.early_gather import gather_early
from parallelisms.fsdp import apply_fsdp
from tests.ranks import run_ranks
from trainer.optim.one_pass import OnePassAdamW

pytestmark = pytest.mark.gpu
WIDTH, LAYERS = 2048, 12


class Stack(nn.Module):
    """Blocks whose activations are several times as large as their gradients."""

    def __init__(self, width, depth):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(width, width, bias=False) for i in range(depth)})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


class Tokens(Stack):
    """The same behind an embedding."""

    def __init__(self, width, depth):
        super().__init__(width, depth)
        self.embeddings = nn.Embedding(8 * width, width)

    def forward(self, tokens):
        return super().forward(self.embeddings(tokens))


def shard(model, mesh, *, reshard_after_forward, **options):
    """FSDP2 as a run has it: bf16 computation, fp32 sums."""
    apply_fsdp(
        model,
        "layers",
        {"embeddings": "embedding"},
        mesh,
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=False,
        **options,
    )


def run(rank, world_size, how, deterministic=False, transport="nccl"):
    """Gradients of three steps with an update after each, the second of two micro-batches; peak memory."""
    gc.collect()  # what a former run holds in cycles would count as there before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    before = torch.cuda.memory_reserved()
    torch.manual_seed(0)
    model = Stack(WIDTH, LAYERS).cuda()
    mesh = init_device_mesh("cuda", (world_size,), mesh_dim_names=("dp_shard",))
    shard(model, mesh, reshard_after_forward=False, reduce_scatter=how, transport=transport)
    found = []
    for step in range(3):
        for micro_batch in range(2 if step == 1 else 1):
            torch.manual_seed(100 * step + 10 * micro_batch + rank)
            if (rank, step % 2) in ((1, 0), (0, 1)):  # ranks are late in turn, by about 0.1 s of GPU time
                torch.cuda._sleep(200_000_000)
            model(torch.randn(4 * WIDTH, WIDTH, device="cuda")).float().square().sum().backward()
        # No synchronisation before this: the optimizer reads what the reduce stream has written.
        found.append([p.grad.to_local().clone() for p in model.parameters()])
        with torch.no_grad():
            for p in model.parameters():
                p.to_local().sub_(p.grad.to_local(), alpha=1e-4)
        model.zero_grad()
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)
    return found, torch.cuda.max_memory_reserved() - before


def equal(got, want):
    return all(torch.equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))


@pytest.fixture
def alone():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_one_gpu_share_the_compute_pool(alone, deterministic):
    """Deterministic algorithms fill what is allocated, on the stream that allocates."""
    run(0, 1, "torch")  # workspaces
    want, torchs = run(0, 1, "torch", deterministic)
    got, pooled = run(0, 1, "compute_pool", deterministic)
    assert equal(got, want)
    # The sums lay in a pool of their own. A second micro-batch's still do, one at a time.
    assert torchs - pooled >= 4 * WIDTH * WIDTH * LAYERS // 2


def worker(rank, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {how: run(rank, 2, how)[0] for how in ("torch", "compute_pool", "bfloat16_wire")}
    found["copies"] = run(rank, 2, "bfloat16_wire", transport="copy_engine")[0]
    for transport in ("nccl", "copy_engine"):
        with mock.patch("parallelisms.fsdp.cast_when_copied"):
            found[f"cast by FSDP2, {transport}"] = run(rank, 2, "bfloat16_wire", transport=transport)[0]
    same = {how: equal(found[how], found["torch"]) for how in found}
    torch.save(same, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multi_gpu
def test_gradients_over_nvlink_are_those_of_torchs_reduction():
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, 2, folder)
        for rank in range(2):
            same = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            assert len(same) == 6
            assert all(same.values()), same


def early_worker(rank, folder):
    """Losses of steps whose optimizer is longer busy with the linears than the embedding takes to gather."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("dp_shard",))
    found = {}
    for transport in ("nccl", "copy_engine"):
        for early in (False, True):
            torch.manual_seed(0)
            model = Tokens(WIDTH, 4 * LAYERS).cuda()
            how = {"reduce_scatter": "bfloat16_wire", "transport": transport}
            shard(model, mesh, reshard_after_forward=False, **how)
            settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
            optimizer = OnePassAdamW(model.parameters(), **settings)
            if early:
                assert gather_early(model, "layers", optimizer)
            losses = []
            for step in range(8):
                torch.manual_seed(10 * step + rank)
                # Few tokens: the host is ahead of the optimizer. Each once: their gradients have one order.
                tokens = torch.randperm(8 * WIDTH, device="cuda")[:256]
                loss = model(tokens).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            found[transport, early] = torch.stack(losses).tolist()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multi_gpu
def test_what_is_gathered_early_is_new():
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(early_worker, 2, folder)
        for rank in range(2):
            found = torch.load(Path(folder) / f"{rank}.pt")
            want = found["nccl", False]
            assert found == dict.fromkeys(found, want)
            assert len(set(want)) == 8


def test_pairs_of_float8_pass_torchs_copies_as_bf16():
    """All pairs of bytes, through both copies of FSDP2's gather; changed are those with a NaN alone."""
    pairs = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(torch.bfloat16)
    copied, spread = torch.zeros_like(pairs), torch.zeros_like(pairs)
    torch._foreach_copy_([copied[:1000], copied[1000:]], [pairs[:1000], pairs[1000:]])
    torch.split_with_sizes_copy(copied.view(2, -1), [8, 2**15 - 8], dim=1, out=out_of(spread))
    changed = copied.view(torch.int16) != pairs.view(torch.int16)
    for dtype in _PASSES_AS_BF16:
        has_nan = pairs.view(dtype).float().isnan().view(-1, 2)[:, 1]
        assert not (changed & ~has_nan).any(), dtype
        assert copied.view(dtype).float().isnan().view(-1, 2)[:, 1][changed].all(), dtype
    parts = copied.view(2, -1).split([8, 2**15 - 8], dim=1)
    assert torch.equal(spread.view(torch.uint8), torch.cat([p.reshape(-1) for p in parts]).view(torch.uint8))


def out_of(whole):
    """Outputs of `split_with_sizes_copy` as FSDP2 makes them: (2, 8) and the rest."""
    return [whole[:16].view(2, -1), whole[16:].view(2, -1)]


def float8_worker(rank, folder):
    """Losses of three steps, where float8 travels as bf16, as bytes, out of kept shards, and by copies."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("dp_shard",))
    found = []
    cases = (
        (_PASSES_AS_BF16, True, "nccl"),
        (_PASSES_AS_BF16, False, "nccl"),
        ((), False, "nccl"),
        (_PASSES_AS_BF16, False, "copy_engine"),
        ((), True, "copy_engine"),
    )
    for formats, keep, transport in cases:
        torch.manual_seed(0)
        config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, keep_float8_shards=keep)
        model = convert_to_float8_training(Stack(WIDTH, 4).cuda(), config=config)
        with mock.patch("converters.float8.fsdp._PASSES_AS_BF16", formats):
            copies = transport == "copy_engine"
            how = {"reduce_scatter": "bfloat16_wire", "transport": transport}
            shard(model, mesh, reshard_after_forward=not copies, **how)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for step in range(3):
                torch.manual_seed(10 * step + rank)
                loss = model(torch.randn(1024, WIDTH, device="cuda")).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                precompute_float8_dynamic_scale_for_fsdp(model)
                found.append(loss.item())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multi_gpu
def test_float8_arrives_alike_as_bf16_and_as_bytes():
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(float8_worker, 2, folder)
        for rank in range(2):
            losses = torch.load(Path(folder) / f"{rank}.pt")
            assert len(losses) == 15
            assert losses == 5 * losses[:3]
            assert len(set(losses)) == 3


@pytest.mark.parametrize("flags", [(), ("--compile.enable",)], ids=["eager", "compiled"])
def test_direct_weights_train_as_copied_ones(train, flags):
    environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    common = (*flags, "--training.global_batch_size=4", "--training.steps=10", "--debug.deterministic")
    runs = {
        name: train(*common, f"--parallelism.{setting}", env=environment, name=name)
        for name, setting in {
            "copy": "fsdp_single_shard=copy",
            "direct": "fsdp_single_shard=direct",
            "pool": "fsdp_reduce_scatter=compute_pool",
        }.items()
    }
    for name in ("direct", "pool"):
        assert runs[name].differences(runs["copy"]) == {"loss": 0, "grad_norm": 0}, name
