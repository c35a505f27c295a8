"""Every formula of float8 scaling, with values worked out by hand."""

import math

import pytest
import torch

from converters.float8.gemm import Float8Operand, scaled_mm
from converters.float8.scaling import (
    cast_to_float8,
    compute_amax,
    dequantize,
    float8_max,
    inverse_scale,
    round_down_to_power_of_2,
    scale_from_amax,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INF, NAN = math.inf, math.nan


def fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize(
    ("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0), (torch.float8_e4m3fnuz, 240.0)]
)
def test_largest_values(dtype: torch.dtype, largest: float) -> None:
    assert float8_max(dtype) == largest


@pytest.mark.parametrize(
    ("amax", "dtype", "scale"),
    [
        (1.0, E4M3, 448.0),
        (448.0, E4M3, 1.0),
        (896.0, E4M3, 0.5),
        (3.0, E4M3, fp32(448.0 / 3.0)),
        (1.0, E5M2, 57344.0),
        (7.0, E5M2, 8192.0),
        (0.0, E4M3, fp32(448.0 / 1e-12)),
        (1e-13, E4M3, fp32(448.0 / 1e-12)),
        (1.401298464324817e-45, E4M3, fp32(448.0 / 1e-12)),
        (INF, E4M3, 0.0),
        (1.0, torch.float8_e4m3fnuz, 240.0),
    ],
)
def test_scale(amax: float, dtype: torch.dtype, scale: float) -> None:
    got = scale_from_amax(torch.tensor(amax), dtype)
    assert got.dtype is torch.float32
    assert got.item() == scale


def test_scale_of_nan_is_nan() -> None:
    assert math.isnan(scale_from_amax(torch.tensor(NAN), E4M3).item())


def test_scale_divides_in_fp64_and_rounds_once() -> None:
    amaxes = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 10 + 1e-3
    want = torch.tensor([448.0 / a for a in amaxes.double().tolist()], dtype=torch.float64).float()
    assert torch.equal(scale_from_amax(amaxes, E4M3), want)


def test_bf16_amax_is_taken_in_bf16_and_scale_in_fp32() -> None:
    amax = compute_amax(torch.tensor([0.1, -0.3], dtype=torch.bfloat16))
    assert amax.dtype is torch.bfloat16
    assert amax.item() == 0.30078125
    assert scale_from_amax(amax, E4M3).item() == fp32(448.0 / 0.30078125)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (INF, INF),
        (NAN, NAN),
        (0.0, 0.0),
        (2.0**-149, 2.0**-149),
        (2.0**-126, 2.0**-126),
        (2.0**-149 * 3, 2.0**-148),
        (1 - 2.0**-24, 0.5),
        (1 + 2.0**-23, 1.0),
        (3.9999998, 2.0),
        (448.0, 256.0),
        # fp32's log2 of this rounds up to 48.
        (2.0**48 * (1 - 2.0**-24), 2.0**47),
        (3.4028234663852886e38, 2.0**127),
    ],
)
def test_power_of_2_rounding(value: float, rounded: float) -> None:
    got = round_down_to_power_of_2(torch.tensor(value, dtype=torch.float32))
    assert got.dtype is torch.float32
    assert same(got, torch.tensor(rounded, dtype=torch.float32))


def test_power_of_2_scale() -> None:
    assert scale_from_amax(torch.tensor(3.0), E4M3, round_to_power_of_2=True).item() == 128.0


def test_amax_axes() -> None:
    x = torch.tensor([[1.0, -5.0, 2.0], [0.5, 3.0, -4.0]])
    assert compute_amax(x).item() == 5.0
    assert compute_amax(x).shape == ()
    assert torch.equal(compute_amax(x, -1), torch.tensor([[5.0], [4.0]]))
    assert torch.equal(compute_amax(x, 0), torch.tensor([[1.0, 5.0, 4.0]]))


def test_amax_of_nothing() -> None:
    x = torch.zeros(0, 3)
    assert compute_amax(x).item() == 0.0
    assert torch.equal(compute_amax(x, 0), torch.zeros(1, 3))
    assert compute_amax(x, -1).shape == (0, 1)


def test_amax_keeps_nan_and_inf() -> None:
    assert math.isnan(compute_amax(torch.tensor([1.0, NAN, 2.0])).item())
    assert compute_amax(torch.tensor([1.0, -INF])).item() == INF


@pytest.mark.parametrize(
    ("dtype", "scale", "values", "want"),
    [
        # e4m3: steps of 32 above 256, of 2^-9 at the bottom; ties go to even.
        (E4M3, 1.0, [0.0, -0.0, 1.0, 448.0, 449.0, 1e9, -1e9], [0.0, -0.0, 1.0, 448.0, 448.0, 448.0, -448.0]),
        (E4M3, 1.0, [304.0, 336.0, 17.0, 19.0], [320.0, 320.0, 16.0, 20.0]),
        (E4M3, 1.0, [2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 2.0**-11], [2.0**-9, 0.0, 2.0**-9, 0.0]),
        (E4M3, 1.0, [NAN, INF, -INF], [NAN, 448.0, -448.0]),
        (E4M3, 2.0, [223.0, 300.0, 0.1], [448.0, 448.0, 0.203125]),
        (E5M2, 1.0, [57344.0, 60000.0, INF, -1e30, NAN], [57344.0, 57344.0, 57344.0, -57344.0, NAN]),
        (E5M2, 1.0, [1.125, 1.375, 2.0**-16, 2.0**-18], [1.0, 1.5, 2.0**-16, 0.0]),
        (E4M3, 0.0, [1.0, INF], [0.0, NAN]),
    ],
)
def test_cast(dtype: torch.dtype, scale: float, values: list[float], want: list[float]) -> None:
    got = cast_to_float8(torch.tensor(values), torch.tensor(scale), dtype)
    assert got.dtype is dtype
    assert same(got.float(), torch.tensor(want))


def test_cast_with_one_scale_a_row() -> None:
    x = torch.tensor([[1.0, 2.0], [100.0, 400.0]])
    scale = scale_from_amax(compute_amax(x, -1), E4M3, round_to_power_of_2=True)
    assert scale.flatten().tolist() == [128.0, 1.0]
    x8 = cast_to_float8(x, scale, E4M3)
    assert x8.float().tolist() == [[128.0, 256.0], [96.0, 384.0]]  # 100 and 400 are ties, to even
    assert dequantize(x8, scale).tolist() == [[1.0, 2.0], [96.0, 384.0]]


def test_zero_tensor_is_safe() -> None:
    x = torch.zeros(4, 4)
    scale = scale_from_amax(compute_amax(x), E4M3)
    x8 = cast_to_float8(x, scale, E4M3)
    assert not x8.float().any()
    assert not dequantize(x8, scale).any()
    assert math.isfinite(inverse_scale(scale).item())


def test_inverse_scale_is_the_rounded_reciprocal() -> None:
    scales = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 1000 + 1e-3
    want = torch.tensor([1.0 / s for s in scales.double().tolist()], dtype=torch.float64).float()
    assert torch.equal(inverse_scale(scales), want)
    assert torch.equal(inverse_scale(scales), 1.0 / scales)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_gemm_by_hand(emulate: bool, rows: bool) -> None:
    a, b = torch.zeros(2, 16), torch.zeros(16, 16)
    a[0, 0], a[0, 1], a[1, 1] = 2.0, 4.0, 8.0
    b[0, 0], b[1, 0], b[1, 3] = 3.0, 0.5, 16.0
    scale_a = torch.tensor([[4.0], [2.0]]) if rows else torch.tensor(4.0)
    scale_b = torch.full((1, 16), 0.5) if rows else torch.tensor(0.5)
    out = scaled_mm(
        Float8Operand(a.to(E4M3), scale_a),
        Float8Operand(b.to(E4M3), scale_b),
        out_dtype=torch.float32,
        use_fast_accum=False,
        emulate=emulate,
    )
    want = torch.zeros(2, 16)
    want[0, 0], want[0, 3] = (2 * 3 + 4 * 0.5) / 4 / 0.5, 4 * 16 / 4 / 0.5
    row = 2.0 if rows else 4.0
    want[1, 0], want[1, 3] = 8 * 0.5 / row / 0.5, 8 * 16 / row / 0.5
    assert torch.equal(out, want)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 20, 32), (1, 33, 16), (0, 16, 16), (4, 0, 16), (4, 16, 0)])
@pytest.mark.parametrize("rows", [False, True])
def test_gemm_of_any_shape(shape: tuple[int, int, int], rows: bool, emulate: bool) -> None:
    p, q, r = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(p, q, generator=generator).to(E5M2)
    b = torch.randn(q, r, generator=generator).to(E4M3)
    scale_a = torch.rand(p, 1, generator=generator) + 0.5 if rows else torch.tensor(0.5)
    scale_b = torch.tensor(2.0)  # a scalar beside rows is repeated
    out = scaled_mm(
        Float8Operand(a, scale_a),
        Float8Operand(b, scale_b),
        out_dtype=torch.float32,
        use_fast_accum=True,
        emulate=emulate,
    )
    assert torch.allclose(out, (a.float() / scale_a) @ (b.float() / scale_b), rtol=1e-5, atol=1e-5)


def test_gemm_is_not_touched_by_autocast() -> None:
    a = Float8Operand(torch.randn(32, 64).to(E4M3), torch.tensor(1.0))
    b = Float8Operand(torch.randn(64, 48).to(E4M3), torch.tensor(1.0))
    for emulate in (False, True):
        plain = scaled_mm(a, b, out_dtype=torch.float32, use_fast_accum=False, emulate=emulate)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = scaled_mm(a, b, out_dtype=torch.float32, use_fast_accum=False, emulate=emulate)
        assert torch.equal(plain, cast)
