"""Learning rate: warm-up, stable, decay, as a factor of the peak rate.

With S steps, warm-up W and decay ratio r: D = round(S r) clipped to S - W (S - W where r is unset) and
stable = S + 1 - W - D. At step s, counted from 0::

    s < W            (s + 1) / W
    s < W + stable   1
    else             p = (s + 1 - W - stable) / D
                     floor + (1 - floor) * {linear: 1 - p, sqrt: 1 - sqrt p, cosine: (1 + cos pi p) / 2}

The rate reaches the floor one step after the last, so that no step trains at a rate of zero. Warm-up,
stable, decay: Hu et al. 2024, arXiv 2404.06395.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from trainer.optim.config import LRSchedulerConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "sqrt": lambda p: 1.0 - math.sqrt(p),
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
}
"""decay_type -> value at progress p in 0..1; falls from 1 to 0."""


def lr_factor(config: LRSchedulerConfig, training_steps: int) -> Callable[[int], float]:
    """The factor of the peak rate as a function of the step, counted from 0."""
    total = config.total_steps or training_steps
    warmup = min(config.warmup_steps, total)
    decay = total - warmup
    if config.decay_ratio is not None:
        decay = min(round(total * config.decay_ratio), total - warmup)
    stable = total + 1 - warmup - decay
    shape, floor = DECAYS[config.decay_type], config.min_lr_factor

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < warmup + stable or decay == 0:
            return 1.0
        progress = min((step + 1 - warmup - stable) / decay, 1.0)
        return floor + (1.0 - floor) * shape(progress)

    return factor


def build_lr_scheduler(optimizer: Optimizer, config: LRSchedulerConfig, training_steps: int) -> LambdaLR:
    """The schedule on `optimizer`; call its `step()` once after each optimizer step."""
    return LambdaLR(optimizer, lr_factor(config, training_steps))
