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


@functools.cache
def _converts_to_float8(index: int | None) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 9)


def gpu_casts_to_float8() -> bool:
    """Whether this process has a GPU on which `runs_float8_triton`."""
    return torch.cuda.is_available() and runs_float8_triton(torch.device("cuda", torch.cuda.current_device()))


def runs_float8_triton(device: torch.device) -> bool:
    """Whether kernels that write float8 run as Triton on `device`: from compute capability 8.9 on."""
    return runs_triton(device) and _converts_to_float8(device.index)
