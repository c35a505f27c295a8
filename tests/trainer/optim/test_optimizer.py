"""Which parameters decay, and clipping."""

import pytest
import torch
from torch import nn

from trainer.optim.clipping import clip_grad_norm
from trainer.optim.config import OptimizerConfig
from trainer.optim.optimizer import build_optimizer


def test_only_matrices_decay():
    model = nn.Sequential(nn.Embedding(4, 3), nn.RMSNorm(3), nn.Linear(3, 2))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3, lr=0.1))
    decay = {
        tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decay == {(4, 3): 0.3, (2, 3): 0.3, (3,): 0.0, (2,): 0.0}


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_one_adamw_step_by_hand(implementation):
    """First step of AdamW: the update is lr * sign(grad) up to eps, after a decay of lr * wd * p."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = build_optimizer(
        model, OptimizerConfig(lr=0.1, weight_decay=0.5, eps=1e-12, implementation=implementation)
    )
    model.weight.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)


def test_adam_decays_through_the_gradient():
    model = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(model, OptimizerConfig(name="Adam"))
    assert type(optimizer) is torch.optim.Adam


def test_clipping_scales_to_the_bound_and_returns_the_norm_before():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([4.0])
    assert float(clip_grad_norm(parameters, 1.0)) == pytest.approx(5.0)
    assert parameters[0].grad[0].item() == pytest.approx(0.6, rel=1e-5)
    assert float(clip_grad_norm(parameters, 10.0)) == pytest.approx(1.0, rel=1e-5)
    assert parameters[1].grad[0].item() == pytest.approx(0.8, rel=1e-5)


def test_no_bound_leaves_gradients_alone():
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([50.0])
    assert float(clip_grad_norm([parameter], 0.0)) == 50.0
    assert parameter.grad.item() == 50.0


def test_norm_of_a_large_tensor_is_exact_to_fp32():
    torch.manual_seed(0)
    grad = torch.randn(3_000_000)
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    assert float(clip_grad_norm([parameter], 0.0)) == pytest.approx(float(grad.double().norm()), rel=1e-7)
