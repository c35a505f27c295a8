"""Optimizers over (possibly sharded) parameters.

Weight decay acts on matrices: every parameter of two or more dims, the embedding included. Norms and biases
are left alone: decay there shifts activations and saves nothing. (torchtitan 0.2.2 decays everything.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kernels.support import runs_triton
from trainer.config.errors import ConfigError, Problem
from trainer.optim.config import OptimizerConfig
from trainer.optim.one_pass import OnePassAdam, OnePassAdamW

log = logging.getLogger(__name__)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
"""optimizer.name -> class. Adam: Kingma and Ba 2015, arXiv 1412.6980; AdamW: arXiv 1711.05101."""

ONE_PASS: dict[str, Callable[..., Optimizer]] = {"AdamW": OnePassAdamW, "Adam": OnePassAdam}
"""The same for optimizer.implementation one_pass."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer that `config` names, over every parameter of `model` that is trained.

    Raises:
        ConfigError: one_pass on a GPU without Triton.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    is_one_pass = config.implementation == "one_pass"
    if is_one_pass:
        _check_device(parameters[0].device)
    kind: dict[str, Any] = {
        "fused": config.implementation == "fused",
        "foreach": config.implementation == "foreach",
    }
    return (ONE_PASS if is_one_pass else OPTIMIZERS)[config.name](
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **({} if is_one_pass else kind),
    )


def _check_device(device: torch.device) -> None:
    """Say where one_pass is not the kernel that it is asked for."""
    if runs_triton(device):
        return
    if device.type == "cuda":
        raise ConfigError(
            [Problem("optimizer.implementation", "one_pass needs Triton, which is not installed")]
        )
    log.warning("optimizer.implementation one_pass: its kernel is for GPUs; on a CPU fused is faster")
