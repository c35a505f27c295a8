"""Compiled blocks on a CUDA GPU whose kernels and casts give amaxes: fewer passes, the same bits."""

import pytest
import torch
from torch import nn

from converters.float8 import Float8LinearConfig, convert_to_float8_training
from models import MODELS
from models.llama3.config import Llama3Config
from parallelisms import compile as block_compile
from parallelisms.amax_pass import AmaxFromProducer
from parallelisms.config import CompileConfig
from parallelisms.graph_passes import GraphPasses
from tests.parallelisms.amaxes import amaxes, amaxes_kernels_could_give
from trainer.calibration.linears import Shape, forward_and_backward, make_operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
aten, octavo = torch.ops.aten, torch.ops.octavo


def blocks():
    config = Llama3Config(
        dim=1024,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=64,
        max_seq_len=256,
        rope_scaling=False,
        attn_backend="math",  # the others add up gradients in any order
        swiglu_kernel="fused",
        norm_kernel="fused",
        rope_kernel="fused",
    )
    with torch.device("cuda"):
        model = MODELS["llama3"].build(config)
    torch.manual_seed(0)
    model.init_weights()
    own = nn.ModuleDict({"layers": model.layers}).to(torch.bfloat16)
    return convert_to_float8_training(own, config=Float8LinearConfig(cast_kernels="triton"))


def train(model, bad):
    model.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(2, 256, 1024, device="cuda").bfloat16()
    x[1, 17, 5] = bad
    h = x.requires_grad_()
    for block in model["layers"].values():
        h = block(h)
    h.float().square().mean().backward()
    return [h.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def test_kernels_give_amaxes_with_the_same_bits(monkeypatch):
    """Of the inputs of wq, wk and wv, of w1 and w3, of w2; of dY of w1, w3 and wo, of wq and wk."""
    counts, call = [], AmaxFromProducer.__call__

    def counting(self, graph):
        before, could = amaxes(graph), amaxes_kernels_could_give(graph)
        call(self, graph)
        taken = set(before) - set(amaxes(graph))
        counts.append((len(could), len(amaxes_kernels_could_give(graph)), taken == set(could)))

    monkeypatch.setattr(AmaxFromProducer, "__call__", counting)
    results = []
    with torch._inductor.config.patch(force_disable_caches=True):
        # The pass over additions rounds less often, with these two or without.
        for passes in (GraphPasses.passes, GraphPasses.passes[:1]):
            monkeypatch.setattr(GraphPasses, "passes", passes)
            torch._dynamo.reset()
            model = blocks()
            block_compile.apply_compile(model, "layers", CompileConfig(enable=True))
            results.append([train(model, bad) for bad in (0.0, float("nan"))])
    assert counts == [(3, 0, True), (5, 0, True)]
    for with_pass, without in zip(*results, strict=True):
        for mine, theirs in zip(with_pass, without, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert all(t.isfinite().all() for t in results[0][0])
    assert results[0][1][0].isnan().any()


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_linear_alone_has_no_scales_beside_its_casts(monkeypatch, bad):
    """No amax and no scale beside the casts of X, W and dY, and the same bits."""
    graphs, call = [], GraphPasses.__call__

    def watching(self, graph):
        call(self, graph)
        targets = [node.target for node in graph.nodes]
        graphs.append([targets.count(op) for op in (octavo.scale_and_cast_both.default, aten.amax.default)])

    monkeypatch.setattr(GraphPasses, "__call__", watching)
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = nn.Linear(512, 768, bias=False, dtype=torch.bfloat16, device="cuda")
    linear = convert_to_float8_training(linear, config=Float8LinearConfig(cast_kernels="triton"))
    operands = make_operands(Shape(1024, 512, 768), torch.device("cuda"), torch.bfloat16)
    with torch.no_grad():
        operands.x[5, 7] = bad
    eager = forward_and_backward(linear, operands, compiled=False)()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = forward_and_backward(linear, operands, compiled=True)()
    assert graphs == [[2, 0], [1, 0]]
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
