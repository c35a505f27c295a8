"""Amaxes that the kernels give: which are taken from them, with the bits and the metadata they had before."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import fresh_inductor_cache
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from converters.float8 import Float8LinearConfig, convert_to_float8_training
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rotate_pairs
from kernels.swiglu import silu_mul
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.addition_pass import AdditionsInNorm
from parallelisms.amax_pass import AMAX_FROM_PRODUCER, AmaxFromProducer
from parallelisms.compile import apply_compile
from parallelisms.config import ActivationCheckpointConfig, CompileConfig
from tests.parallelisms.amaxes import amaxes, amaxes_kernels_could_give

aten, octavo = torch.ops.aten, torch.ops.octavo


class Checked(Interpreter):
    """Runs a graph and holds every result against the node's metadata."""

    def run_node(self, node):
        result = super().run_node(node)
        expected = node.meta.get("val")
        if isinstance(expected, (tuple, list)):
            pairs = zip(expected, result, strict=True)
        else:
            pairs = [(expected, result)] if isinstance(result, torch.Tensor) and expected is not None else []
        for want, got in pairs:
            assert (tuple(want.shape), want.dtype, want.stride()) == (got.shape, got.dtype, got.stride()), (
                node
            )
        return result


def backend(counts):
    """AOT graphs, changed by hand and then interpreted; `counts` of amaxes before and after."""

    def compiler(gm, inputs):
        before, could = amaxes(gm.graph), amaxes_kernels_could_give(gm.graph)
        AMAX_FROM_PRODUCER(gm.graph)
        gm.graph.lint()
        gm.recompile()
        assert set(before) - set(amaxes(gm.graph)) == set(could)
        counts.append((len(before), len(amaxes(gm.graph))))
        return make_boxed_func(Checked(gm).run)

    return aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
    )


class Block(nn.Module):
    """Half of attention's output and a feed-forward, as Llama 3 has them."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(32, 32, bias=False)
        self.norm = nn.Parameter(torch.rand(32) + 0.5)
        self.w1, self.w3 = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.w2 = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        h, normed = add_rms_norm(x, self.wo(x), self.norm, 1e-5)
        return h + self.w2(silu_mul(self.w1(normed), self.w3(normed)))


class Turned(nn.Module):
    """Queries and keys, multiplied in the place of attention."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(32) + 0.5)
        self.wq, self.wk = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        angles = torch.rand(20, 4)
        self.tables = angles.cos(), angles.sin()

    def forward(self, x):
        normed = rms_norm(x, self.norm, 1e-5)
        q, k = (linear(normed).unflatten(-1, (-1, 8)) for linear in (self.wq, self.wk))
        q, k = (rotate_pairs(t, *self.tables, False, False)[0] for t in (q, k))
        return x + (q * k).flatten(-2)


class Small(nn.Module):
    """Of the above, one linear whose input and whose gradient a kernel makes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(32) + 0.5)
        self.w1 = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        normed = rms_norm(x, self.norm, 1e-5)
        return x + silu_mul(self.w1(normed), normed)


def two_of(block):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])}).to(torch.bfloat16)
    return convert_to_float8_training(model, config=Float8LinearConfig(cast_kernels="triton"))


def train(model):
    model.zero_grad()
    torch.manual_seed(1)
    x = h = torch.randn(3, 16, 32).bfloat16().requires_grad_()
    for block in model["layers"]:
        h = block(h)
    h.float().square().sum().backward()
    return [h.detach(), x.grad, *(p.grad for p in model.parameters())]


def check_compiled(model, want, counts):
    """Blocks compiled with the pass, which notes `counts`, train as `want` says."""
    torch._dynamo.reset()
    own = backend(counts)
    for block in model["layers"]:
        block.compile(backend=own, fullgraph=True)
    for eager, compiled in zip(want, train(model), strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_block_trains_with_the_same_bits(recompute):
    """Forward takes amaxes of four weights and of x; the inputs of w1 and w3, and of w2, come with theirs.

    Backward takes that of w2's output's gradient; w1's, w3's and wo's come. Recomputed, it has forward's too.
    """
    model, counts = two_of(Block), []
    want = train(model)
    apply_activation_checkpoint(model, "layers", ActivationCheckpointConfig(mode=recompute))
    check_compiled(model, want, counts)
    assert counts[0] == (7, 5)
    assert counts[1:] == [(11, 6) if recompute == "full" else (4, 1)]


def test_gradients_of_queries_and_keys_come_with_their_amaxes():
    """Forward takes those of two weights and nobody asks for those of what is turned; backward none."""
    model, counts = two_of(Turned), []
    check_compiled(model, train(model), counts)
    assert counts == [(3, 2), (2, 0)]


def test_inductor_runs_it_once_for_all_blocks_and_caches_the_result(monkeypatch):
    counts, call = [], AmaxFromProducer.__call__

    def counting(self, graph):
        before = len(amaxes(graph))
        call(self, graph)
        counts.append((before, len(amaxes(graph))))

    monkeypatch.setattr(AmaxFromProducer, "__call__", counting)
    monkeypatch.setattr(AdditionsInNorm, "__call__", lambda self, graph: None)  # which saves roundings
    model = two_of(Small)
    want = train(model)
    apply_compile(model, "layers", CompileConfig(enable=True))
    with fresh_inductor_cache():
        for hits in (0, 2):
            torch._dynamo.reset()
            counters.clear()
            for eager, compiled in zip(want, train(model), strict=True):
                assert torch.equal(eager, compiled)
            assert counts == [(2, 1), (1, 0)]  # the second time nothing is compiled
            assert counters["inductor"]["fxgraph_cache_hit"] == hits
            assert counters["inductor"]["fxgraph_cache_bypass"] == 0


def graph_of(function, *inputs):
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()  # as every compiled graph: results that nobody uses
    gm.recompile()
    return gm


def product(gate, up, with_amax=False):
    return octavo.silu_mul.default(gate, up, with_amax)


LEFT_ALONE = {
    "by row": lambda g, u: aten.amax(aten.abs(product(g, u)[0]), [1]),
    "kept dims": lambda g, u: aten.amax(aten.abs(product(g, u)[0]), [], True),
    "signed": lambda g, u: aten.amax(product(g, u)[0]),
    "converted": lambda g, u: aten.amax(aten.abs(product(g, u)[0].float())),
    "a part": lambda g, u: aten.amax(aten.abs(product(g, u)[0][1:])),
    "empty amaxes in use": lambda g, u: (aten.amax(aten.abs((made := product(g, u))[0])), made[1]),
    "fp64": lambda g, u: aten.amax(aten.abs(product(g.double(), u.double())[0])),
    "not measured": lambda g, u: aten.amax(
        aten.abs(octavo.rms_norm.default(g, u, torch.ones_like(g[0]), 1e-5, False)[0])
    ),
    "no kernel's": lambda g, u: aten.amax(aten.abs(g * u)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_something_else_is_left_alone(name):
    gm = graph_of(LEFT_ALONE[name], *torch.randn(2, 4, 6).bfloat16())
    before = str(gm.graph)
    AMAX_FROM_PRODUCER(gm.graph)
    assert str(gm.graph) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("worst", [1.0, float("inf"), float("nan")])
def test_one_amax_for_all_who_ask(dtype, worst):
    """Through views, from a kernel that was asked before as from one that was not; two results of one."""

    def function(grad, gate, up):
        y, given = product(gate, up, True)
        dgate, dup, _ = octavo.silu_mul_backward.default(grad, gate, up, False)
        sideways = aten.amax(aten.abs(y.t().reshape(-1, 2)))
        return given, sideways, sideways * 2, *(aten.amax(aten.abs(t.view(-1))) for t in (dup, dgate, y))

    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 6).to(dtype)
    inputs[2, 1, 2] = worst
    gm = graph_of(function, *inputs)
    want = gm(*inputs)
    AMAX_FROM_PRODUCER(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert not any(node.target in (aten.amax.default, aten.abs.default) for node in gm.graph.nodes)
    got = Checked(gm).run(*inputs)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
