"""The fused kernels inside the model: the same parameters, values and gradients as PyTorch's operations."""

from dataclasses import replace

import pytest
import torch

from models import MODELS
from models.llama3.config import Llama3Config
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.compile import apply_compile
from parallelisms.config import ActivationCheckpointConfig, CompileConfig


@pytest.mark.parametrize("recompute", ["none", "full", "op"])
def test_fused_kernels_are_the_same_model(recompute):
    """Names, values and gradients, also where blocks are compiled and recomputed."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 203, "multiple_of": 32}
    plain = Llama3Config(**sizes, max_seq_len=50, rope_scaling=False)
    fused = replace(plain, swiglu_kernel="fused", norm_kernel="fused")
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
