"""Where Triton kernels can run."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed (CUDA builds of torch bring it; CPU builds do not)."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether kernels run as Triton on `device`; elsewhere their PyTorch reference does."""
    return device.type == "cuda" and has_triton()
