"""Where float8 is expected to lose: a roofline estimate of one linear, forward + backward.

    t_bf16   = 6 M K N / R_bf16
    t_float8 = 6 M K N / R_float8 + cast bytes / B
    cast bytes = a M K + b N K + c M N     (a, b, c: what the casts read and write per element)

Rates are an H100's as measured, not its data sheet's; other GPUs have about the same ratio of
float8 FLOP/s to bytes/s. The estimate knows no launch overhead and assumes compiled casts, so it is kind to
small layers; it names only those that lose even so.
"""

from __future__ import annotations

from dataclasses import dataclass

from converters.float8.config import Float8LinearRecipeName


@dataclass(frozen=True)
class CastBytes:
    """Bytes that the casts move per element of X, W and Y."""

    x: int
    w: int
    y: int


BF16_FLOPS = 700e12
FLOAT8_FLOPS = 1270e12
BYTES_PER_SECOND = 3.0e12
_CAST_BYTES = {
    Float8LinearRecipeName.TENSORWISE: CastBytes(10, 8, 6),
    Float8LinearRecipeName.ROWWISE: CastBytes(12, 12, 8),
    Float8LinearRecipeName.ROWWISE_WITH_GW_HP: CastBytes(5, 12, 5),
}


def expected_speedup(recipe: Float8LinearRecipeName, m: int, k: int, n: int) -> float:
    """Time in bf16 over time in float8, for one device's GEMM sizes; under 1 where float8 loses."""
    gemms = 6.0 * m * k * n
    # One of the three GEMMs stays bf16 with rowwise_with_gw_hp.
    in_float8 = 2 / 3 if recipe is Float8LinearRecipeName.ROWWISE_WITH_GW_HP else 1.0
    per = _CAST_BYTES[recipe]
    casts = (per.x * m * k + per.w * n * k + per.y * m * n) / BYTES_PER_SECOND
    float8 = gemms * in_float8 / FLOAT8_FLOPS + gemms * (1 - in_float8) / BF16_FLOPS + casts
    return gemms / BF16_FLOPS / float8 if gemms else 1.0
