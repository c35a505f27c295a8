"""Float8 training of linears: a library of its own, and the ``float8`` converter of a run.

`docs/float8.md` teaches it. Names are imported on first use, so that importing the package is free.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.float8.cast_config import CastConfig, ScalingGranularity, ScalingType
    from converters.float8.config import (
        DelayedScalingConfig,
        Float8GemmConfig,
        Float8LinearConfig,
        Float8LinearRecipeName,
    )
    from converters.float8.convert import convert_to_float8_training
    from converters.float8.converter import Float8Converter
    from converters.float8.delayed import sync_float8_amax_and_scale_history
    from converters.float8.filters import auto_filter_for_recipe
    from converters.float8.linear import Float8Linear
    from converters.float8.tensor_parallel import (
        Float8ColwiseParallel,
        Float8RowwiseParallel,
        PrepareFloat8ModuleInput,
    )
    from converters.float8.weight_scales import precompute_float8_dynamic_scale_for_fsdp

__all__ = [
    "CastConfig",
    "DelayedScalingConfig",
    "Float8ColwiseParallel",
    "Float8Converter",
    "Float8GemmConfig",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8RowwiseParallel",
    "PrepareFloat8ModuleInput",
    "ScalingGranularity",
    "ScalingType",
    "auto_filter_for_recipe",
    "convert_to_float8_training",
    "precompute_float8_dynamic_scale_for_fsdp",
    "sync_float8_amax_and_scale_history",
]

_HOME = {
    "CastConfig": "cast_config",
    "DelayedScalingConfig": "config",
    "Float8ColwiseParallel": "tensor_parallel",
    "Float8Converter": "converter",
    "Float8GemmConfig": "config",
    "Float8Linear": "linear",
    "Float8LinearConfig": "config",
    "Float8LinearRecipeName": "config",
    "Float8RowwiseParallel": "tensor_parallel",
    "PrepareFloat8ModuleInput": "tensor_parallel",
    "ScalingGranularity": "cast_config",
    "ScalingType": "cast_config",
    "auto_filter_for_recipe": "filters",
    "convert_to_float8_training": "convert",
    "precompute_float8_dynamic_scale_for_fsdp": "weight_scales",
    "sync_float8_amax_and_scale_history": "delayed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
