"""Optimizers over (possibly sharded) parameters.

Weight decay acts on matrices: every parameter of two or more dims, the embedding included. Norms and biases
are left alone: decay there shifts activations and saves nothing. (torchtitan 0.2.2 decays everything.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.optim.config import OptimizerConfig

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
"""optimizer.name -> class. Adam: Kingma and Ba 2015, arXiv 1412.6980; AdamW: arXiv 1711.05101."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that `config` names, over every parameter of `model` that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name](
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
