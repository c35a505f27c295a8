"""What one linear costs in bf16 and in float8, forward + backward: a roofline model.

X = M K, W = N K, Y = M N elements. A GEMM (P, Q) @ (Q, R) with b bytes an operand's element (bf16 2,
float8 1) and a 2-byte result is bound by arithmetic or by memory; B is memory traffic in bytes/s:

    t_gemm   = max(2 P Q R / rate, (b (P Q + Q R) + 2 P R) / B)
    t_bf16   = t_gemm of output (M, K, N), grad_input (M, N, K) and grad_weight (N, M, K)
    t_float8 = the same with float8 operands + cast bytes / B
    cast bytes = x X + w W + y Y

so the three GEMMs move 6 (X + W + Y) bytes in bf16 and 4 (X + W + Y) in float8. (x, w, y) is what the casts
read and write: what a compiler makes of them (an amax and a cast per GEMM, transposed ones apart); what the
Triton kernels do (an amax, and one pass that writes both layouts); or ``fused``, where the amax is taken by
who makes the tensor as well; weights have no producer.

    compiled   tensorwise 10 8 6    rowwise 12 12 8    rowwise_with_gw_hp  5 12 5
    triton     tensorwise  6 6 6    rowwise  6  6 6    rowwise_with_gw_hp  3  6 3
    fused      tensorwise  4 8 4    rowwise  4 12 4    rowwise_with_gw_hp  3 12 3

The model knows no launches and no badly coalesced stores, so it is kind to small layers and to transposed
casts: (8192, 4096, 1024) alone on an H100 is 1.16 times as fast in it by the Triton kernels, and 1.08 in
fact; rowwise 1.16 and 0.99. Among layers that read one X it does not stand alone: a compiled block casts X
once, and the others pay for W and Y only (``shares_input``).

A run's report uses it to name the converted layers that lose even so, with an H100's ceilings; other GPUs
have about the same ratio of float8 FLOP/s to bytes/s. The benchmarks use it with any device's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from converters.float8.config import Float8LinearRecipeName


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches, not what its data sheet says."""

    bf16_flops: float
    float8_flops: float
    bytes_per_second: float
    """Of memory traffic, read and write together."""


@dataclass(frozen=True)
class CastBytes:
    """Bytes that the casts move per element of X, W and Y."""

    x: int
    w: int
    y: int


@dataclass(frozen=True)
class LinearCost:
    """Seconds of one linear's forward + backward."""

    bf16_gemm_seconds: float
    float8_gemm_seconds: float
    """Of all three GEMMs; one of them stays bf16 with rowwise_with_gw_hp."""
    cast_seconds: float

    @property
    def float8_seconds(self) -> float:
        """GEMMs and casts, one after the other."""
        return self.float8_gemm_seconds + self.cast_seconds

    @property
    def speedup(self) -> float:
        """Time in bf16 over time in float8; 1 for a linear of no size."""
        return self.bf16_gemm_seconds / self.float8_seconds if self.float8_seconds else 1.0


H100 = Ceilings(700e12, 1270e12, 3.0e12)

Casts: TypeAlias = Literal["compiled", "triton", "fused"]

_TENSORWISE, _ROWWISE, _GW_HP = Float8LinearRecipeName
_CASTS: dict[Casts, dict[Float8LinearRecipeName, CastBytes]] = {
    "compiled": {
        _TENSORWISE: CastBytes(10, 8, 6),
        _ROWWISE: CastBytes(12, 12, 8),
        _GW_HP: CastBytes(5, 12, 5),
    },
    "triton": {_TENSORWISE: CastBytes(6, 6, 6), _ROWWISE: CastBytes(6, 6, 6), _GW_HP: CastBytes(3, 6, 3)},
    "fused": {_TENSORWISE: CastBytes(4, 8, 4), _ROWWISE: CastBytes(4, 12, 4), _GW_HP: CastBytes(3, 12, 3)},
}


def gemms(m: int, k: int, n: int) -> dict[str, tuple[int, int, int]]:
    """The three GEMMs of a linear as (rows, contraction, columns)."""
    return {"output": (m, k, n), "grad_input": (m, n, k), "grad_weight": (n, m, k)}


def in_float8(recipe: Float8LinearRecipeName, gemm: str) -> bool:
    """Whether that GEMM has float8 operands."""
    return not (recipe is Float8LinearRecipeName.ROWWISE_WITH_GW_HP and gemm == "grad_weight")


def gemm_seconds(p: int, q: int, r: int, ceilings: Ceilings, *, float8: bool) -> float:
    """One GEMM (P, Q) @ (Q, R) with a 2-byte result: bound by arithmetic or by memory."""
    rate = ceilings.float8_flops if float8 else ceilings.bf16_flops
    moved = (1 if float8 else 2) * (p * q + q * r) + 2 * p * r
    return max(2.0 * p * q * r / rate, moved / ceilings.bytes_per_second)


def cast_bytes(
    recipe: Float8LinearRecipeName,
    m: int,
    k: int,
    n: int,
    *,
    casts: Casts = "compiled",
    shares_input: bool = False,
) -> int:
    """Bytes that amaxes and casts of one linear move, forward + backward; see `linear_cost`."""
    per = _CASTS[casts][recipe]
    return (0 if shares_input else per.x * m * k) + per.w * n * k + per.y * m * n


def linear_cost(
    recipe: Float8LinearRecipeName,
    m: int,
    k: int,
    n: int,
    ceilings: Ceilings = H100,
    *,
    casts: Casts = "compiled",
    shares_input: bool = False,
) -> LinearCost:
    """The model of one device's linear with input (M, K) and weight (N, K).

    Args:
        recipe: Whose GEMMs and casts.
        m: Tokens.
        k: in_features.
        n: out_features.
        ceilings: The device's.
        casts: Who casts; see the module.
        shares_input: Another linear's cast of X serves this one.
    """
    sizes = gemms(m, k, n)
    moved = cast_bytes(recipe, m, k, n, casts=casts, shares_input=shares_input)
    return LinearCost(
        sum(gemm_seconds(*size, ceilings, float8=False) for size in sizes.values()),
        sum(gemm_seconds(*size, ceilings, float8=in_float8(recipe, gemm)) for gemm, size in sizes.items()),
        moved / ceilings.bytes_per_second,
    )
