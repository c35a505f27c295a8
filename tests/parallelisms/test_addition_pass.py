"""Additions around a norm's backward: which its kernel takes over, with what result."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_inductor_cache
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.rms_norm import add_rms_norm, rms_norm
from parallelisms.addition_pass import AdditionsInNorm
from parallelisms.compile import apply_compile
from parallelisms.config import CompileConfig

aten, octavo = torch.ops.aten, torch.ops.octavo
D = 8


def backward(grad, h, stream=None):
    w, rstd = torch.ones(D, dtype=h.dtype), torch.ones(h.shape[:-1])
    return octavo.rms_norm_backward.default([grad], h, w, rstd, stream, False)


def changed(function, *inputs):
    """(graph before, graph after, what it returns then)."""
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    before = str(gm.graph)
    AdditionsInNorm()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return before, str(gm.graph), gm(*inputs)


def additions(graph):
    return graph.count("target=torch.ops.aten.add.Tensor")


def rows(*shape):
    """Whole numbers, whose sums are exact."""
    return [torch.randint(-4, 5, (*shape, D)).bfloat16() for _ in range(4)]


TAKEN = {
    "two": (lambda a, b, h, o: backward(a + b, h), 1),
    "three": (lambda a, b, h, o: backward((a + b) + o, h), 2),
    "three, the other way": (lambda a, b, h, o: backward(a + (b + o), h), 2),
    "three of four": (lambda a, b, h, o: backward(((a + b) + o) + h, h), 2),
    "behind views": (lambda a, b, h, o: backward((a.view(-1, D) + b.view(-1, D)).view(2, 3, D), h), 1),
    "views between": (
        lambda a, b, h, o: backward((a + b).view(-1, D).add(o.view(-1, D)).view(2, 3, D), h),
        2,
    ),
    "after": (lambda a, b, h, o: (backward(a, h)[0] + o, h), 1),
    "after, the other way": (lambda a, b, h, o: (o + backward(a, h)[0], h), 1),
    "after views": (lambda a, b, h, o: (backward(a, h)[0].view(-1, D) + o.view(-1, D), h), 1),
    "both": (lambda a, b, h, o: (backward(a + b, h)[0] + o, h), 2),
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_kernel_takes_additions_over(name):
    torch.manual_seed(0)
    function, taken = TAKEN[name]
    inputs = rows(2, 3)
    want = function(*inputs)
    before, after, got = changed(function, *inputs)
    assert additions(before) - additions(after) == taken
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-4)


LEFT_ALONE = {
    "the sum is read elsewhere": lambda a, b, h, o: (backward(s := a + b, h)[0], s),
    "a factor": lambda a, b, h, o: backward(torch.add(a, b, alpha=2), h),
    "a number": lambda a, b, h, o: backward(a + 1, h),
    "broadcast": lambda a, b, h, o: backward(a + b[:1], h),
    "turned": lambda a, b, h, o: backward(a + b.transpose(0, 1).contiguous().transpose(0, 1), h),
    "other rows": lambda a, b, h, o: backward((a.view(2, -1) + b.view(2, -1)).view(2, 3, D), h),
    "after, read elsewhere": lambda a, b, h, o: ((d := backward(a, h)[0]) + o, d * 2),
    "after, with a stream": lambda a, b, h, o: (backward(a, h, o)[0] + b, h),
    "after, to itself": lambda a, b, h, o: ((d := backward(a, h)[0]) + d, h),
    "after, to what comes later": lambda a, b, h, o: (backward(a, h)[0] + o.sin(), h),
    "after, wider": lambda a, b, h, o: (backward(a, h)[0] + o.float(), h),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_something_else_is_left_alone(name):
    inputs = rows(2, 3)
    before, after, got = changed(LEFT_ALONE[name], *inputs)
    assert additions(after) == additions(before)
    assert after == before
    for mine, theirs in zip(got, LEFT_ALONE[name](*inputs), strict=True):
        assert torch.equal(mine, theirs)


class Block(nn.Module):
    """A norm whose output has three readers, one with two; both of a residual stream."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.rand(32) + 0.5) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(5))

    def forward(self, x):
        y = rms_norm(x, self.first, 1e-5)
        added = sum(torch.tanh(linear(y)) for linear in self.linears[:3])
        h, y = add_rms_norm(x, added, self.second, 1e-5)
        return h + torch.tanh(self.linears[3](y)) * self.linears[4](y)


def test_a_compiled_block_has_no_additions_of_gradients(monkeypatch):
    """Three before the kernels, one after; gradients are those of eager to roundings."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    graphs, call = [], AdditionsInNorm.__call__

    def recording(self, graph):
        before = additions(str(graph))
        call(self, graph)
        graphs.append((before, additions(str(graph))))

    monkeypatch.setattr(AdditionsInNorm, "__call__", recording)

    def train():
        model.zero_grad()
        x = h = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for block in model["layers"]:
            h = block(h)
        h.square().sum().backward()
        return [h.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]

    want = train()
    torch._dynamo.reset()
    apply_compile(model, "layers", CompileConfig(enable=True))
    with fresh_inductor_cache():
        got = train()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (forward_before, forward_after), (before, after) = graphs
    assert forward_before == forward_after
    assert before - after == 4
