"""The fused kernels inside the model: the same parameters, values and gradients as PyTorch's operations."""

from dataclasses import replace

import pytest
import torch

from models import MODELS
from models.llama3.config import Llama3Config
from models.rope import RotaryEmbedding
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.compile import apply_compile
from parallelisms.config import ActivationCheckpointConfig, CompileConfig


@pytest.mark.parametrize("recompute", ["none", "full", "op"])
def test_fused_kernels_are_the_same_model(recompute):
    """Names, values and gradients, also where blocks are compiled and recomputed."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 203, "multiple_of": 32}
    plain = Llama3Config(**sizes, max_seq_len=50, rope_scaling=False)
    fused = replace(plain, swiglu_kernel="fused", norm_kernel="fused", rope_kernel="fused")
    modes = {"none": "none", "full": "full", "op": "selective"}
    recomputed = ActivationCheckpointConfig(mode=modes[recompute], selective_ac_option="op")
    results = []
    for config in (plain, fused):
        model = MODELS["llama3"].build(config)
        torch.manual_seed(0)
        model.init_weights()
        if config is fused:
            apply_activation_checkpoint(model, "layers", recomputed)
            apply_compile(model, "layers", CompileConfig(enable=True, backend="aot_eager"))
        logits = model(torch.arange(100).view(2, 50))
        logits.square().sum().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (want, gradients), (got, own) = results
    torch.testing.assert_close(got, want)
    assert gradients.keys() == own.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() < 2e-6 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_rotary_kernel_changes_no_bit(dtype, recompute):
    """Of logits and gradients, eager and compiled, with a table that is longer, and for chosen positions."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 203, "multiple_of": 32}
    plain = Llama3Config(**sizes, max_seq_len=50)
    results = []
    for config, backend in (
        (plain, None),
        (replace(plain, rope_kernel="fused"), None),
        (replace(plain, rope_kernel="fused"), "aot_eager"),
    ):
        model = MODELS["llama3"].build(config)
        torch.manual_seed(0)
        model.init_weights()
        model.to(dtype)
        if recompute:
            apply_activation_checkpoint(model, "layers", ActivationCheckpointConfig(mode="full"))
        if backend:
            apply_compile(model, "layers", CompileConfig(enable=True, backend=backend))
        found = []
        for positions in (None, torch.arange(0, 66, 3)):
            model.rope.set_positions(positions)
            model.zero_grad()
            logits = model(torch.arange(44).view(2, 22))
            logits.float().square().sum().backward()
            found += [logits.detach(), *(p.grad.clone() for p in model.parameters())]
        results.append(found)
    want, *others = results
    assert not torch.equal(want[0], want[len(want) // 2])
    for got in others:
        assert all(map(torch.equal, want, got))


def test_the_rotary_kernel_keeps_nothing_of_what_it_turns():
    """Not the input and not the result: the tables alone, also where nobody has memory yet."""
    rope = RotaryEmbedding(8, 50, 500000.0, fused=True)
    kept = []
    x = torch.randn(2, 20, 4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        rope(x)
    assert {t.data_ptr() for t in kept} == {rope.cos.data_ptr(), rope.sin.data_ptr()}
    on_meta = rope.to("meta")(x.to("meta"))
    assert (on_meta.shape, on_meta.dtype) == (x.shape, x.dtype)
