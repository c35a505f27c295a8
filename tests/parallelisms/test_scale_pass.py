"""Amaxes that come with their cast: which, with the bits and the metadata they had before."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.utils import fresh_inductor_cache
from torch.fx.experimental.proxy_tensor import make_fx

from converters.float8 import Float8LinearConfig, convert_to_float8_training
from kernels import cast
from kernels.scaling import inverse_scale, scale_from_amax
from models import MODELS
from models.llama3.config import Llama3Config
from parallelisms.graph_passes import GRAPH_PASSES, GraphPasses
from parallelisms.scale_pass import ScaleWithCast
from tests.parallelisms.test_amax_pass import Checked
from trainer.calibration.linears import Shape, forward_and_backward, make_operands

aten, octavo = torch.ops.aten, torch.ops.octavo
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES = {aten.amax.default, aten.abs.default, aten.div.Tensor, aten.reciprocal.default, aten.full.default}


def count(graph, *targets):
    return sum(node.target in targets for node in graph.nodes)


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Inductor's graphs as the passes leave them; nothing comes out of a cache."""
    graphs, call = [], GraphPasses.__call__

    def watching(self, graph):
        call(self, graph)
        graph.lint()
        graphs.append(graph)

    monkeypatch.setattr(GraphPasses, "__call__", watching)
    torch._dynamo.reset()
    with fresh_inductor_cache():
        yield graphs


def test_a_linear_alone_has_no_scales_beside_its_casts(compiled_graphs):
    """X and W in forward, dY in backward, as they are timed and calibrated."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    linear = convert_to_float8_training(linear, config=Float8LinearConfig(cast_kernels="triton"))
    operands = make_operands(Shape(48, 64, 32), torch.device("cpu"), torch.bfloat16)
    eager, compiled = (
        forward_and_backward(linear, operands, compiled=compiled) for compiled in (False, True)
    )
    for mine, theirs in zip(compiled(), eager(), strict=True):
        assert torch.equal(mine, theirs)
    for graph, casts, gemms in zip(compiled_graphs, (2, 1), (1, 2), strict=True):
        assert count(graph, octavo.scale_and_cast_both.default) == casts
        assert count(graph, aten._scaled_mm.default) == gemms
        assert count(graph, *SCALES, octavo.cast_both.default) == 0


PLAIN = (3, 8), (5, 2)
"""What norms, SwiGLU, rope and additions make is measured there.

Left in forward: inputs of wq, wk and wv, of w1 and w3, and of w2. Left in backward: the gradients of what
w3, w1, wo, wk and wq put out. With their casts: seven weights and attention's output; the gradients of
what the block (w2) and wv put out.
"""
FUSED = (0, 11), (0, 7)
"""Kernels give all of these amaxes, and their scales come with their casts as well."""


@pytest.mark.parametrize(("kernels", "counts"), [("torch", PLAIN), ("fused", FUSED)])
def test_a_block_keeps_the_amaxes_that_are_fused(kernels, counts):
    config = Llama3Config(
        dim=64,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=64,
        max_seq_len=32,
        rope_scaling=False,
        norm_kernel=kernels,
        swiglu_kernel=kernels,
        rope_kernel=kernels,
    )
    model = MODELS["llama3"].build(config)
    torch.manual_seed(0)
    model.init_weights()
    own = nn.ModuleDict({"layers": model.layers}).to(torch.bfloat16)
    convert_to_float8_training(own, config=Float8LinearConfig(cast_kernels="triton"))
    graphs = []

    def compiler(gm, inputs):
        view_to_reshape(gm)  # as inductor does
        GRAPH_PASSES(gm.graph)
        gm.recompile()
        graphs.append(gm.graph)
        return make_boxed_func(Checked(gm).run)

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    for block in own["layers"].values():
        block.compile(backend=backend, fullgraph=True)
    h = torch.randn(2, 32, 64).bfloat16().requires_grad_()
    for block in own["layers"].values():
        h = block(h)
    h.float().square().mean().backward()
    found = [(count(graph, aten.amax.default), together(graph)) for graph in graphs]
    assert found == list(counts)


def together(graph):
    return count(graph, octavo.scale_and_cast_both.default)


def graph_of(function, *inputs):
    """As inductor's, decomposed."""
    gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def scaled(t, of=None, dtype=E4M3):
    """T and the scale of it, or `of` another."""
    return t, scale_from_amax(aten.amax(aten.abs(t if of is None else of)), dtype)


def both(t, scale, dtype=E4M3):
    return cast.cast_both(t, scale, dtype)


LEFT_ALONE = {
    "made by an addition": lambda a, b: both(*scaled(a + b)),
    "made by a view of one": lambda a, b: both(*scaled((a + b).t())),
    "copied": lambda a, b: both(*scaled(a.t().clone(memory_format=torch.contiguous_format))),
    "another's amax": lambda a, b: both(*scaled(a, of=b)),
    "a part's amax": lambda a, b: both(*scaled(a, of=a[1:])),
    "for another format": lambda a, b: both(*scaled(a, dtype=E5M2)),
    "power of 2": lambda a, b: both(a, scale_from_amax(aten.amax(aten.abs(a)), E4M3, True)),
    "recorded": lambda a, b: (
        both(a, scale_from_amax(amax := aten.amax(aten.abs(a)), E4M3)),
        amax * 2,
    ),
    "signed": lambda a, b: both(a, scale_from_amax(aten.amax(a), E4M3)),
    "given": lambda a, b: both(a, b[0, 0].float()),
    "used before": lambda a, b: (
        (made := scaled(a))[1] * 2,
        both(*made),
    ),
    "another cast": lambda a, b: cast.cast_float8(*scaled(a), E4M3),
    "no cast": lambda a, b: (a.float() * scaled(a)[1]).to(E4M3),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_something_else_is_left_alone(name):
    gm = graph_of(LEFT_ALONE[name], *torch.randn(2, 6, 6).bfloat16())
    before = str(gm.graph)
    ScaleWithCast()(gm.graph)
    assert str(gm.graph) == before


def as_it_is(x, w):
    return x


def gemm(x, w):
    return torch.mm(x, w)


def viewed(x, w):
    return torch.mm(x, w).view(2, 3, 6).permute(2, 0, 1).unsqueeze(0).squeeze(0).permute(1, 2, 0).view(6, 6)


def attention(x, w):
    x, w = (t.view(1, 1, 6, 6) for t in (x, w))
    return aten._scaled_dot_product_flash_attention_for_cpu(x, w, w)[0].view(6, 6)


def kernel(x, w):
    return octavo.rms_norm.default(x, w, x[0], 1e-5, False)[1]


def matrices(worst):
    """Two, one element of the first being `worst`."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 6, 6).bfloat16()
    inputs[0, 1, 2] = worst
    return inputs


def check_scale_made_by_the_cast(function, graph_pass, inputs):
    """The one scale of `function` comes with its cast, to the same bits and metadata."""
    gm = graph_of(function, *inputs)
    want = gm(*inputs)
    graph_pass(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert together(gm.graph) == 1
    assert count(gm.graph, *SCALES, octavo.cast_both.default) == 0
    for mine, theirs in zip(Checked(gm).run(*inputs), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("worst", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("maker", [as_it_is, gemm, viewed, attention, kernel])
def test_the_same_bits_and_metadata(maker, worst):
    """Also where the scale serves two casts and its inverse is kept."""

    def function(x, w):
        t = maker(x, w).t()
        _, scale = scaled(t, dtype=E5M2)
        first = both(t, scale, E5M2)
        other = cast.cast_float8(t.contiguous(), scale, E5M2)
        return *(made.float() for made in (*first, other)), scale, inverse_scale(scale)

    check_scale_made_by_the_cast(function, ScaleWithCast(), matrices(worst))


@pytest.mark.parametrize("worst", [1.0, float("inf"), float("nan")])
def test_a_scale_of_an_amax_that_a_kernel_gave(worst):
    """The same bits; with elements of 4 bytes, which are cast elsewhere, it stays where it is."""

    def function(x, w):
        t = octavo.silu_mul.default(x, w, False)[0]
        _, scale = scaled(t.view(3, 12))
        made = both(t.view(6, 6), scale)
        return *(part.float() for part in made), scale, inverse_scale(scale)

    inputs = matrices(worst)
    check_scale_made_by_the_cast(function, GRAPH_PASSES, inputs)
    wide = graph_of(function, *inputs.float())
    GRAPH_PASSES(wide.graph)
    assert (together(wide.graph), count(wide.graph, octavo.cast_both.default)) == (0, 1)
