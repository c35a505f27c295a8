"""The roofline model against values worked out by hand."""

import pytest

from converters.float8.config import Float8LinearRecipeName
from converters.float8.cost import Ceilings, cast_bytes, gemm_seconds, linear_cost

TENSORWISE, ROWWISE, GW_HP = Float8LinearRecipeName


def test_a_gemm_is_bound_by_arithmetic_or_by_memory():
    # (10, 20) @ (20, 40): 16,000 FLOP; operands 200 + 800 elements, result 400.
    slow_memory = Ceilings(bf16_flops=1000, float8_flops=2000, bytes_per_second=100)
    assert gemm_seconds(10, 20, 40, slow_memory, float8=False) == (2 * 1000 + 2 * 400) / 100 == 28
    assert gemm_seconds(10, 20, 40, slow_memory, float8=True) == (1000 + 2 * 400) / 100 == 18
    fast_memory = Ceilings(bf16_flops=1000, float8_flops=2000, bytes_per_second=1e9)
    assert gemm_seconds(10, 20, 40, fast_memory, float8=False) == 16
    assert gemm_seconds(10, 20, 40, fast_memory, float8=True) == 8


def test_gemms_of_a_linear_move_six_and_four_bytes():
    m, k, n = 32, 48, 80
    x, w, y = m * k, n * k, m * n
    memory_alone = Ceilings(1e30, 1e30, 1.0)
    cost = linear_cost(TENSORWISE, m, k, n, memory_alone)
    assert cost.bf16_gemm_seconds == 6 * (x + w + y)
    assert cost.float8_gemm_seconds == 4 * (x + w + y)
    # One GEMM in bf16: dYᵀ X reads dY and X in two bytes each.
    mixed = linear_cost(GW_HP, m, k, n, memory_alone)
    assert mixed.float8_gemm_seconds == 4 * (x + w + y) + (x + y)


@pytest.mark.parametrize(
    ("recipe", "casts", "x", "w", "y"),
    [
        (TENSORWISE, "compiled", 10, 8, 6),
        (TENSORWISE, "fused", 4, 8, 4),
        (ROWWISE, "compiled", 12, 12, 8),
        (ROWWISE, "fused", 4, 12, 4),
        (GW_HP, "compiled", 5, 12, 5),
        (GW_HP, "fused", 3, 12, 3),
        (TENSORWISE, "triton", 6, 6, 6),
        (ROWWISE, "triton", 6, 6, 6),
        (GW_HP, "triton", 3, 6, 3),
    ],
)
def test_bytes_of_the_casts(recipe, casts, x, w, y):
    m, k, n = 2, 3, 5
    assert cast_bytes(recipe, m, k, n, casts=casts) == x * 6 + w * 15 + y * 10
    assert cast_bytes(recipe, m, k, n, casts=casts, shares_input=True) == w * 15 + y * 10


def test_a_square_linear_on_an_h100():
    # 6 x 4096^3 = 412.3 GFLOP; X = W = Y = 16.78 M elements, 24 bytes of casts each.
    cost = linear_cost(TENSORWISE, 4096, 4096, 4096)
    assert cost.bf16_gemm_seconds == pytest.approx(412.3e9 / 700e12, rel=1e-3)
    assert cost.float8_gemm_seconds == pytest.approx(412.3e9 / 1270e12, rel=1e-3)
    assert cost.cast_seconds == pytest.approx(24 * 16.777e6 / 3e12, rel=1e-3)
    assert cost.speedup == pytest.approx(589.0 / (324.7 + 134.2), rel=1e-3)


def test_fusion_helps_and_nothing_costs_nothing():
    sizes = (8192, 4096, 1024)
    for recipe in Float8LinearRecipeName:
        assert linear_cost(recipe, *sizes, casts="fused").speedup > linear_cost(recipe, *sizes).speedup
        assert linear_cost(recipe, 0, 4096, 4096).speedup < 1  # the weight is cast all the same
        assert linear_cost(recipe, 0, 0, 0).speedup == 1
