"""The float8 all-gather on four gloo processes: equal to one process, and what travels, byte by byte.

Every rank sees the same batch, so that one process is the reference to the last digits: scales of activations
are those of a rank's own batch, which would differ where the batches do.
"""

import contextlib
import dataclasses
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from converters.base import ConverterContext
from converters.config import Float8SectionConfig
from converters.float8.converter import Float8Converter
from converters.float8.fsdp import FSDPFloat8Shard
from models import MODELS
from parallelisms.fsdp import apply_fsdp
from parallelisms.tensor_parallel import apply_tensor_parallel
from tests.ranks import run_ranks
from trainer.loss import cross_entropy_sum

STEPS, BATCH, SEQ, LAYERS, DIM, VOCAB = 10, 2, 32, 2, 64, 128
SPEC = MODELS["llama3"]
CONFIG = dataclasses.replace(
    SPEC.flavors["debugmodel"],
    n_layers=LAYERS,
    dim=DIM,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=VOCAB,
    max_seq_len=SEQ,
)
LAYOUTS = {
    # name: (dp_replicate, dp_shard, tp)
    "fsdp": (1, 4, 1),
    "hsdp": (2, 2, 1),
    "fsdp_tp": (1, 2, 2),
    "hsdp_tp": (2, 1, 2),
}


AS_BF16 = ("fsdp", "fsdp_tp")


class Traffic(TorchDispatchMode):
    """Bytes that this rank gives to all-gathers by dtype, and its all-reduces outside of DTensor's."""

    def __init__(self):
        super().__init__()
        self.gathered, self.all_reduces = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered[str(args[1].dtype).removeprefix("torch.")] += (
                args[1].numel() * args[1].element_size()
            )
        if func is torch.ops.c10d.allreduce_.default:
            self.all_reduces += 1
        return func(*args, **(kwargs or {}))


def build(gather, layout=None, compiled=False, log_stats_freq=0, dtype=torch.float32):
    section = Float8SectionConfig(
        filter_fqns=["output"], enable_fsdp_float8_all_gather=gather, log_stats_freq=log_stats_freq
    )
    context = ConverterContext(device_type="cpu", tokens_per_microbatch=BATCH * SEQ)
    converter = Float8Converter(section, context)
    with torch.device("meta"):
        model = SPEC.build(CONFIG)
    converter.convert(model)
    if layout is not None:
        mesh = init_device_mesh("cpu", layout, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        apply_tensor_parallel(model, SPEC.roles, mesh["tp"], style_for=converter.parallel_style)
        if compiled:
            for block in model.layers.values():
                block.compile(backend="aot_eager", fullgraph=True)
        apply_fsdp(
            model,
            SPEC.blocks,
            SPEC.roles,
            mesh["dp_replicate", "dp_shard"] if layout[0] > 1 else mesh["dp_shard"],
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            reshard_after_forward=True,
            cpu_offload=False,
        )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model, converter


def train(model, converter, precompute=False, ranks=1, steps=STEPS, count=Traffic):
    """Losses, and what `count` sees of each step's forward and backward, and after the optimizer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    converter.section = dataclasses.replace(
        converter.section, precompute_float8_dynamic_scale_for_fsdp=precompute
    )
    losses, in_step, after_step = [], [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
        with count() as traffic:
            loss = cross_entropy_sum(model(tokens), tokens.roll(-1, 1)) / tokens.numel()
            (loss / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        with count() as after:
            converter.after_optimizer_step(model)
        losses.append(float(loss.detach()))
        if count is Traffic:
            in_step.append((traffic.gathered, traffic.all_reduces))
            after_step.append((after.gathered, after.all_reduces))
    return losses, in_step, after_step


def weights(model):
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
    return {name: t.detach().clone() for name, t in whole.items()}


def worker(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    try:
        single, converter = build(gather=False)
        found = {"one": (train(single, converter)[0], weights(single))}
        for name, layout in LAYOUTS.items():
            for precompute in (False, True):
                model, converter = build(gather=True, layout=layout)
                shards = [p for p in model.parameters() if isinstance(p.to_local(), FSDPFloat8Shard)]
                assert len(shards) == 7 * LAYERS
                result = train(model, converter, precompute, ranks=layout[0] * layout[1])
                found[name, precompute] = (*result, weights(model))
        plain, converter = build(gather=False, layout=LAYOUTS["fsdp"])
        found["high_precision"] = train(plain, converter, ranks=4, steps=1)[1]
        compiled, converter = build(gather=True, layout=LAYOUTS["fsdp_tp"], compiled=True)
        found["compiled"] = train(
            compiled, converter, precompute=True, ranks=2, steps=3, count=contextlib.nullcontext
        )[0]
        for name, layout in ((name, LAYOUTS[name]) for name in AS_BF16):
            for formats in ((torch.float8_e4m3fn,), ()):
                with mock.patch("converters.float8.fsdp._PASSES_AS_BF16", formats):
                    model, converter = build(gather=True, layout=layout, dtype=torch.bfloat16)
                    losses, traffic, _ = train(model, converter, ranks=layout[0] * layout[1], steps=2)
                found["bfloat16", name, bool(formats)] = (losses, traffic[1][0], weights(model))
        watched, converter = build(gather=True, layout=LAYOUTS["fsdp_tp"], log_stats_freq=1)
        converter.before_step(watched, 1)
        train(watched, converter, ranks=2, steps=1)
        found["health"] = converter.metrics(watched)
        if rank == 0:
            torch.save(found, f"{folder}/found")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, 4, folder)
        return torch.load(Path(folder) / "found")


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_adam_steps_equal_one_process(found, layout, precompute):
    losses, want = found[layout, precompute][0], found["one"][0]
    # Sums split over tp round differently, and Adam turns a tiny gradient into a step.
    splits_sums = "tp" in layout
    assert losses == pytest.approx(want, rel=1e-5 if splits_sums else 1e-6)
    assert want[-1] < want[0]
    if not splits_sums:
        for name, weight in found["one"][1].items():
            torch.testing.assert_close(found[layout, precompute][3][name], weight, rtol=1e-5, atol=1e-6)


def test_a_compiled_block_gathers_split_weights(found):
    assert found["compiled"] == pytest.approx(found["one"][0][:3], rel=1e-5)


FLOAT8_ELEMENTS = sum(
    p.numel()
    for name, p in SPEC.build(CONFIG).named_parameters()
    if name.startswith("layers.") and "norm" not in name
)
NORM_ELEMENTS = 2 * LAYERS * DIM


def test_one_byte_per_element_travels_forward_and_backward(found):
    """Each rank gives its quarter twice, once for forward and once for backward, and no scale."""
    (gathered, _), (high_precision, _) = found["fsdp", True][1][1], found["high_precision"][0]
    # A block is one buffer of bytes, float8 weights beside fp32 norms; the rest goes in fp32, once: the
    # embedding's backward reads no weight, and [norm, output] stay gathered for theirs.
    assert gathered == {
        "uint8": 2 * (FLOAT8_ELEMENTS + 4 * NORM_ELEMENTS) // 4,
        "float32": (2 * VOCAB * DIM + DIM) * 4 // 4,
    }
    assert high_precision["float32"] > 3.5 * gathered["uint8"]


@pytest.mark.parametrize("layout", AS_BF16)
def test_float8_that_travels_as_bf16_is_the_same_float8(found, layout):
    losses, gathered, trained = found["bfloat16", layout, True]
    same_losses, in_bytes, same_trained = found["bfloat16", layout, False]
    assert losses == same_losses
    assert all(torch.equal(t, same_trained[name]) for name, t in trained.items())
    assert set(gathered) == {"bfloat16"}
    assert set(in_bytes) == {"bfloat16", "uint8"}
    assert gathered.total() == in_bytes.total()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_precompute_is_one_all_reduce(found, layout):
    _, in_step, after_step, _ = found[layout, True]
    assert [count for _, count in after_step] == [1] * STEPS
    assert all(not gathered for gathered, _ in after_step)
    without = found[layout, False]
    assert [count for _, count in without[2]] == [0] * STEPS
    # From the second step on scales are at hand: no weight's amax is reduced in forward or in backward.
    saved = [count - fewer for (_, count), (_, fewer) in zip(without[1], in_step, strict=True)]
    groups = (LAYOUTS[layout][1] > 1) + (LAYOUTS[layout][2] > 1)
    assert saved == [0] + [2 * 7 * LAYERS * groups] * (STEPS - 1)


def test_health_of_a_gathered_weight_is_its_shards(found):
    health = found["health"]
    for layer in range(LAYERS):
        for name in ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2"):
            tag = f"float8/layers.{layer}.{name}/weight"
            assert 0.01 < health[f"{tag}/amax"] < 0.2
            assert health[f"{tag}/saturated_share"] == 0
            assert 25 < health[f"{tag}/sqnr_db"] < 40
