"""The learning-rate schedule against values worked out by hand."""

import pytest
import torch

from trainer.optim.config import LRSchedulerConfig
from trainer.optim.schedule import build_lr_scheduler, lr_factor


def factors(steps, **fields):
    factor = lr_factor(LRSchedulerConfig(**fields), steps)
    return [factor(step) for step in range(steps)]


def test_the_known_answer():
    got = factors(10, warmup_steps=2, decay_ratio=0.8)
    assert got == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_without_a_ratio_decay_follows_warm_up():
    # W = 2, D = 4, stable = 6 + 1 - 2 - 4 = 1
    assert factors(6, warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_stable_part_and_floor():
    # D = 2, stable = 8 + 1 - 2 - 2 = 5; p = 0 at step 6, counted (s + 1 - W - stable) / D
    got = factors(8, warmup_steps=2, decay_ratio=0.25, min_lr_factor=0.2)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.6])


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)])
def test_decay_shapes_at_half_way(shape, half):
    # W = 0, D = 4, stable = 1: p = 1/2 at step 2
    assert factors(4, warmup_steps=0, decay_type=shape)[2] == pytest.approx(half)


def test_warm_up_longer_than_the_run_is_cut():
    assert factors(4, warmup_steps=100) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_total_steps_replaces_the_run_length():
    assert factors(3, warmup_steps=2, total_steps=6) == pytest.approx([0.5, 1, 1])


def test_no_decay_at_all():
    assert factors(4, warmup_steps=0, decay_ratio=0.0) == [1, 1, 1, 1]


def test_the_scheduler_sets_the_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_lr_scheduler(optimizer, LRSchedulerConfig(warmup_steps=2, decay_ratio=0.8), 10)
    seen = []
    for _ in range(10):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([1.0, 2, 2, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])
