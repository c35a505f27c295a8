"""Recomputation leaves names and results alone; patterns match components."""

import pytest
import torch
from torch import nn

from converters.float8 import Float8LinearConfig, convert_to_float8_training
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.blocks import blocks_of, matches
from parallelisms.compile import apply_compile, start_compilers
from parallelisms.config import ActivationCheckpointConfig, CompileConfig


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(8, 8, bias=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + torch.relu(self.w(x))


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleDict({str(i): Block() for i in range(4)})})


def run(m):
    x = torch.ones(2, 8, requires_grad=True)
    out = x
    for _, block in blocks_of(m, "layers"):
        out = block(out)
    out.sum().backward()
    return [p.grad for p in m.parameters()], [block.calls for _, block in blocks_of(m, "layers")]


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({"mode": "none"}, [1, 1, 1, 1]),
        ({"mode": "full"}, [2, 2, 2, 2]),
        ({"mode": "selective", "selective_ac_option": "2"}, [1, 2, 1, 2]),
        ({"mode": "selective", "selective_ac_option": "op"}, [2, 2, 2, 2]),
    ],
)
def test_what_is_recomputed(fields, calls):
    plain, _ = run(model())
    wrapped = model()
    names = list(wrapped.state_dict())
    note = apply_activation_checkpoint(wrapped, "layers", ActivationCheckpointConfig(**fields))
    grads, counted = run(wrapped)
    assert counted == calls
    assert list(wrapped.state_dict()) == names
    assert note.startswith("activation checkpointing")
    for mine, expected in zip(grads, plain, strict=True):
        assert torch.equal(mine, expected)


def test_per_op_keeps_every_other_matmul():
    """Of two matmuls in a block the first is kept: recomputation runs one, not two."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        mm = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.mm += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return torch.sin(self.b(torch.sin(self.a(x))))

    def matmuls(mode):
        m = nn.ModuleDict({"layers": nn.ModuleDict({"0": Two()})})
        config = ActivationCheckpointConfig(mode=mode, selective_ac_option="op")
        apply_activation_checkpoint(m, "layers", config)
        x = torch.ones(2, 8, requires_grad=True)
        with Count() as count:
            m["layers"]["0"](x).sum().backward()
        return count.mm

    kept = matmuls("none")
    assert matmuls("full") == kept + 2
    assert matmuls("selective") == kept + 1


@pytest.mark.parametrize("cast_kernels", ["torch", "triton"])
def test_a_compiled_float8_block_keeps_its_input_alone(cast_kernels):
    """torch 2.11 by itself keeps what an autograd function does inside."""
    kept = {}
    for mode in ("none", "full"):
        torch._dynamo.reset()
        config = Float8LinearConfig(cast_kernels=cast_kernels)
        block = convert_to_float8_training(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), config=config
        )
        m = nn.ModuleDict({"layers": nn.ModuleDict({"0": block})})
        apply_activation_checkpoint(m, "layers", ActivationCheckpointConfig(mode=mode))
        apply_compile(m, "layers", CompileConfig(enable=True, backend="aot_eager_decomp_partition"))
        x, shapes = torch.randn(16, 32, requires_grad=True), []

        def note(t, shapes=shapes):
            shapes.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = block(x)
        y.sum().backward()
        weights = [tuple(p.shape) for p in m.parameters()]
        kept[mode] = sorted(shape for shape in shapes if shape not in weights)
    assert kept["full"] == [(16, 32)]
    assert len(kept["none"]) > 4


def test_patterns():
    assert matches("layers.*.attention.wq", "layers.11.attention.wq")
    assert not matches("layers.*.wq", "layers.11.attention.wq")
    assert not matches("output", "layers.output")


@pytest.mark.parametrize(
    ("config", "device_type", "started"),
    [
        (CompileConfig(enable=True), "cuda", True),
        (CompileConfig(enable=True), "cpu", False),
        (CompileConfig(enable=True, backend="eager"), "cuda", False),
        (CompileConfig(), "cuda", False),
    ],
)
def test_compilers_start_where_triton_kernels_will_be_compiled(config, device_type, started, monkeypatch):
    calls = []
    monkeypatch.setattr("torch._inductor.async_compile.maybe_warm_pool", lambda: calls.append(None))
    assert start_compilers(config, device_type) is started
    assert len(calls) == started
