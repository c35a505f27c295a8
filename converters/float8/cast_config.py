"""How one operand of a float8 GEMM is cast: where its scale comes from, what shares it, and the format.

Float8 formats: e4m3 (4 exponent, 3 mantissa bits) for values, e5m2 for gradients that need range;
Micikevicius et al. 2022, arXiv 2209.05433. `float8_dtypes` is the one place that knows AMD's variants.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch


class ScalingType(str, Enum):
    """Where a scale comes from."""

    DYNAMIC = "dynamic"
    """From the tensor's own amax, at each use."""
    DELAYED = "delayed"
    """From the amaxes of past steps."""
    STATIC = "static"
    """Given by the user, never updated."""
    DISABLED = "disabled"
    """No float8: the operand stays in high precision."""


class ScalingGranularity(str, Enum):
    """What shares one scale."""

    TENSORWISE = "tensorwise"
    """The whole tensor."""
    AXISWISE = "axiswise"
    """Elements along the GEMM's contraction: a scale per row of the left operand, per column of the right."""


class Float8Dtypes(NamedTuple):
    """The two float8 formats of a device."""

    e4m3: torch.dtype
    e5m2: torch.dtype


@functools.lru_cache(maxsize=1)
def float8_dtypes() -> Float8Dtypes:
    """The format pair of this machine: the OCP formats, or on AMD MI300 (gfx94x) their fnuz variants."""
    if torch.version.hip and torch.cuda.is_available():
        arch = torch.cuda.get_device_properties(0).gcnArchName
        if arch.startswith("gfx94"):
            return Float8Dtypes(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    return Float8Dtypes(torch.float8_e4m3fn, torch.float8_e5m2)


_SHORT_DTYPE = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2fnuz: "e5m2fnuz",
}
E5M2 = (torch.float8_e5m2, torch.float8_e5m2fnuz)
"""Both variants of the format for gradients."""
_SHORT_TYPE = {"dynamic": "dyn", "delayed": "del", "static": "sta"}
_SHORT_GRANULARITY = {"tensorwise": "ten", "axiswise": "axs"}


@dataclass(frozen=True)
class CastConfig:
    """How one operand is cast to float8."""

    scaling_type: ScalingType = ScalingType.DYNAMIC
    """Where the scale comes from."""
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    """What shares one scale; AXISWISE needs DYNAMIC."""
    target_dtype: torch.dtype | None = None
    """Float8 format; None stands for e4m3 (input, weight) or e5m2 (grad_output)."""
    static_scale: torch.Tensor | None = None
    """The scale of STATIC: a positive fp32 scalar that values are multiplied by before the cast."""

    def __post_init__(self) -> None:
        axiswise = self.scaling_granularity is ScalingGranularity.AXISWISE
        if axiswise and self.scaling_type not in (ScalingType.DYNAMIC, ScalingType.DISABLED):
            raise ValueError(
                f"CastConfig: AXISWISE granularity needs scaling_type DYNAMIC, got {self.scaling_type.name}"
            )
        if self.target_dtype is not None and self.target_dtype not in _SHORT_DTYPE:
            allowed = ", ".join(str(dtype) for dtype in _SHORT_DTYPE)
            raise ValueError(f"CastConfig: target_dtype is {self.target_dtype}, allowed: {allowed}")
        if self.scaling_type is ScalingType.STATIC:
            self._check_static_scale()
        elif self.static_scale is not None:
            raise ValueError(
                f"CastConfig: static_scale has no effect with {self.scaling_type.name}; use STATIC"
            )

    def _check_static_scale(self) -> None:
        scale = self.static_scale
        if not isinstance(scale, torch.Tensor) or scale.numel() != 1:
            raise ValueError("CastConfig: scaling_type STATIC needs static_scale, a tensor of one element")
        if not (math.isfinite(scale.item()) and scale.item() > 0):
            raise ValueError(f"CastConfig: static_scale must be finite and positive, got {scale.item()}")

    @property
    def enabled(self) -> bool:
        """False where the operand stays in high precision."""
        return self.scaling_type is not ScalingType.DISABLED

    @property
    def axiswise(self) -> bool:
        """True where each row has its own scale."""
        return self.enabled and self.scaling_granularity is ScalingGranularity.AXISWISE

    @property
    def dtype(self) -> torch.dtype:
        """The float8 format, once a Float8LinearConfig has resolved it."""
        if self.target_dtype is None:
            raise ValueError("CastConfig: target_dtype is still unset; a Float8LinearConfig resolves it")
        return self.target_dtype

    def short(self) -> str:
        """As the module's repr shows it: ``dyn_ten_e4m3``, or ``hp`` for high precision."""
        if not self.enabled:
            return "hp"
        dtype = _SHORT_DTYPE[self.dtype]
        granularity = _SHORT_GRANULARITY[self.scaling_granularity.value]
        return f"{_SHORT_TYPE[self.scaling_type.value]}_{granularity}_{dtype}"
