"""Single GEMMs as `torch.mm` and `torch._scaled_mm` run them, and ceilings measured with them.

A is (M, K) row-major, B (K, N) column-major, that is, both contiguous along the contraction, as float8 tensor
cores want them; bf16 GEMMs take the same layout. The result is bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.float8.cast_config import float8_dtypes
from converters.float8.cost import Ceilings
from converters.float8.gemm import CPU_HAS_ROW_SCALES, unsupported_reason
from trainer.calibration.timing import Work, time_in_turns


@dataclass(frozen=True)
class Kind:
    """One way to multiply."""

    name: str
    float8: bool
    rowwise: bool = False
    fast_accumulation: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why that device cannot run it, or None."""
        if not self.float8:
            return None
        if self.rowwise and device.type == "cpu" and not CPU_HAS_ROW_SCALES:
            return "no row scales on a CPU in this torch"
        return unsupported_reason(device.type, device.index, self.rowwise)


BF16 = Kind("bf16", float8=False)
TENSORWISE = Kind("tensorwise", float8=True)
TENSORWISE_FAST = Kind("tensorwise, fast accumulation", float8=True, fast_accumulation=True)
ROWWISE = Kind("rowwise", float8=True, rowwise=True)
ROWWISE_FAST = Kind("rowwise, fast accumulation", float8=True, rowwise=True, fast_accumulation=True)
KINDS = (BF16, TENSORWISE, TENSORWISE_FAST, ROWWISE, ROWWISE_FAST)


def matmul(kind: Kind, m: int, k: int, n: int, device: torch.device) -> Work:
    """A function that runs the GEMM (M, K) @ (K, N) once, on random operands."""
    dtype = float8_dtypes().e4m3 if kind.float8 else torch.bfloat16
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16).to(dtype) for rows in (m, n))
    if not kind.float8:
        return lambda: torch.mm(a, b.t())
    scale_a = torch.ones((m, 1) if kind.rowwise else (), device=device)
    scale_b = torch.ones((1, n) if kind.rowwise else (), device=device)
    return lambda: torch._scaled_mm(
        a,
        b.t(),
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=kind.fast_accumulation,
    )


def matmul_seconds(kind: Kind, m: int, k: int, n: int, device: torch.device, repetitions: int) -> float:
    """Median seconds of one GEMM."""
    return time_in_turns({"": matmul(kind, m, k, n, device)}, device, repetitions)[""].median


def measured_ceilings(device: torch.device, size: int = 8192, repetitions: int = 30) -> Ceilings:
    """What this device reaches: square GEMMs, and a copy (of 1 GiB for the default size).

    The float8 rate is that of a linear's three GEMMs with fast accumulation in the first alone.
    """

    def rate(*kinds: Kind) -> float:
        seconds = [matmul_seconds(kind, size, size, size, device, repetitions) for kind in kinds]
        return len(kinds) * 2.0 * size**3 / sum(seconds)

    has_float8 = TENSORWISE.missing(device) is None
    float8 = rate(TENSORWISE_FAST, TENSORWISE, TENSORWISE) if has_float8 else 0.0
    return Ceilings(rate(BF16), float8, _copy_rate(16 * size * size, device, repetitions))


def _copy_rate(size: int, device: torch.device, repetitions: int) -> float:
    """Bytes read and written a second."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_in_turns({"": lambda: target.copy_(source)}, device, repetitions)[""].median
    return 2 * size / seconds
