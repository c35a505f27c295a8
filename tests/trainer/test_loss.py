"""The summed loss: its value, ignored labels, dtype."""

import math

import pytest
import torch

from trainer.data.packing import IGNORED_LABEL
from trainer.loss import cross_entropy_sum


def test_uniform_logits_give_log_v_per_valid_token():
    labels = torch.tensor([[0, 1, IGNORED_LABEL], [2, IGNORED_LABEL, IGNORED_LABEL]])
    loss = cross_entropy_sum(torch.zeros(2, 3, 5), labels)
    assert float(loss) == pytest.approx(3 * math.log(5))


def test_all_ignored_is_zero_with_zero_gradient():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((1, 2), IGNORED_LABEL))
    loss.backward()
    assert float(loss) == 0.0
    assert float(logits.grad.abs().sum()) == 0.0


def test_computed_in_fp32():
    torch.manual_seed(0)
    logits = torch.randn(2, 64, 100, dtype=torch.bfloat16)
    labels = torch.randint(0, 100, (2, 64))
    loss = cross_entropy_sum(logits, labels)
    assert loss.dtype == torch.float32
    exact = -torch.log_softmax(logits.double(), -1).gather(-1, labels[..., None]).sum()
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
