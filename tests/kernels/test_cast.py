"""Casts with one scale by Triton's interpreter, before they round to float8, and their compiled form."""

import math

import pytest
import torch

from kernels import cast
from kernels.scaling import compute_amax, float8_max, inverse_scale, scale_from_amax

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("without the interpreter kernels need CUDA tensors: see tests/gpu", allow_module_level=True)

from kernels.triton import amax as amaxes
from kernels.triton import cast as kernels
from tests.kernels.casts import (
    E4M3,
    E5M2,
    SIZES,
    VECTOR_LOAD,
    VECTOR_STORE,
    all_same,
    compiled,
    rounded_away,
    same,
    sample,
)
from tests.kernels.hopper import reads_undefined

PARTS = amaxes.PARTS


@pytest.fixture(autouse=True)
def _few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a program, were it idle."""
    monkeypatch.setattr(amaxes, "PARTS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(), (1,), (5000,), (7, 11, 13), (3, 9000)])
def test_amax(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = sample(*size, dtype=dtype)
    got = amaxes.amax(x)
    assert got.dtype is dtype
    assert torch.equal(got, compute_amax(x))


def test_a_program_of_amax_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks and a bit among two programs: three rounds."""
    monkeypatch.setattr(amaxes, "PARTS", 2)
    blocks = sample(5 * 8192 + 3).split(8192)
    for number, block in enumerate(blocks):
        block[-1] = -100 - number
    x = torch.cat(blocks)
    assert amaxes.amaxes_of_parts(x).tolist() == [104, 105]
    assert amaxes.amaxes_of_parts(x[: 2 * 8192]).tolist() == [100, 101]
    assert amaxes.amaxes_of_parts(x[:8192]).tolist() == [100, 0]


def test_amax_reads_a_dense_tensor_where_it_lies() -> None:
    x = sample(4, 6, 10)
    turned = x.permute(2, 0, 1)
    assert amaxes._dense(turned).data_ptr() == x.data_ptr()
    gaps = x[:, ::2].permute(1, 2, 0)
    gaps[2, 3, 1] = 50
    x[0, 1] = 70  # in a gap
    assert amaxes.amax(gaps).item() == 50
    assert amaxes.amax(turned).item() == 70


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_amax_keeps_what_is_not_finite(bad: float) -> None:
    x = sample(300, dtype=torch.bfloat16)
    x[7], x[9] = bad, math.inf
    assert same(amaxes.amax(x), compute_amax(x))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [(1,), (5000,), (3, 5, 7)])
def test_cast_float8(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, scale = sample(*size, dtype=torch.bfloat16), torch.tensor(1e4)
    x.view(-1)[0] = math.nan
    got = kernels.cast_float8(x, scale, dtype, stored_as=torch.float32)
    assert same(got, rounded_away(x, scale, dtype))
    assert got.nan_to_num(0).abs().max() <= float8_max(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [*SIZES, (128, 144)])
def test_one_scale_both_layouts(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, scale = sample(*size, dtype=dtype), torch.tensor(100.0)  # beyond 448 / 100 it saturates
    x[0, 0] = math.nan
    want = rounded_away(x, scale, E4M3)
    rows, columns = kernels.cast_both(x, scale, E4M3, stored_as=torch.float32)
    assert same(rows, want)
    assert same(columns, want.t())
    assert columns.is_contiguous()
    assert same(kernels.cast_transposed(x, scale, E4M3, stored_as=torch.float32), want.t())


def scaled_and_cast(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    scale = scale_from_amax(compute_amax(x), dtype)
    rows = rounded_away(x, scale, dtype)
    return rows, rows.t(), scale, inverse_scale(scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [*SIZES, (128, 144)])
def test_a_scale_made_by_the_cast(size: tuple[int, int], dtype: torch.dtype) -> None:
    for float8 in (E4M3, E5M2):
        x = sample(*size, dtype=dtype)
        got = kernels.scale_and_cast_both(x, float8, stored_as=torch.float32)
        assert all_same(got, scaled_and_cast(x, float8))
        amax = compute_amax(x).float()
        assert all_same(kernels.scale_and_cast_both(x, float8, amax, torch.float32), got)
        twice = kernels.scale_and_cast_both(x, float8, 2 * amax, torch.float32)
        assert torch.equal(twice[2], scale_from_amax(2 * amax, float8))
        assert same(twice[0], rounded_away(x, twice[2], float8))
    strided = sample(40, 60, dtype=dtype)[::2, 10:50].t()
    got = kernels.scale_and_cast_both(strided, E4M3, stored_as=torch.float32)
    assert all_same(got, scaled_and_cast(strided, E4M3))


@pytest.mark.parametrize("largest", [0, 1e-12, 1e-13, 3, 3.3e38, math.inf, math.nan, -math.inf])
def test_a_scale_made_by_the_cast_of_edge_values(largest: float) -> None:
    x = torch.zeros(3, 20, dtype=torch.bfloat16)
    x[2, 7] = largest
    got = kernels.scale_and_cast_both(x, E5M2, stored_as=torch.float32)
    assert all_same(got, scaled_and_cast(x, E5M2))


@pytest.mark.parametrize("size", SIZES)
def test_transpose(size: tuple[int, int]) -> None:
    x = sample(*size).to(E4M3)
    got = kernels.transpose_float8(x)
    assert got.dtype is E4M3
    assert torch.equal(got.view(torch.uint8), x.t().contiguous().view(torch.uint8))


def test_a_strided_tensor_is_read_as_it_looks() -> None:
    x = sample(40, 60)[::2, 10:50].t()
    scale = torch.tensor(2.0)
    rows, columns = kernels.cast_both(x, scale, E4M3, stored_as=torch.float32)
    assert torch.equal(rows, x * 2)
    assert torch.equal(columns, x.t() * 2)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [(0, 16), (16, 0), (1, 1), (1, 48), (33, 1), (20, 48)])
def test_operators_without_a_gpu_are_the_reference(size: tuple[int, int], dtype: torch.dtype) -> None:
    """And their meta forms have its shapes, dtypes and strides."""
    x, scale = sample(*size, dtype=torch.bfloat16), torch.tensor(7.0)
    x8 = cast.cast_float8(x, scale, dtype)
    calls = (
        (cast.amax, (x,)),
        (cast.cast_float8, (x, scale, dtype)),
        (cast.cast_both, (x, scale, dtype)),
        (cast.scale_and_cast_both, (x, dtype)),
        (cast.cast_transposed, (x, scale, dtype)),
        (cast.transpose_float8, (x8,)),
        (cast.cast_rows, (x, dtype, True)),
        (cast.cast_columns, (x, dtype, True)),
        (cast.cast_rows_and_columns, (x, dtype, True)),
    )
    for op, arguments in calls:
        torch.library.opcheck(op.overload, arguments, test_utils="test_faketensor")
    both, turned = cast.cast_both(x, scale, dtype)
    assert torch.equal(
        both.float(), torch.clamp(x.float() * 7, -float8_max(dtype), float8_max(dtype)).to(dtype).float()
    )
    assert torch.equal(turned.float(), both.float().t())
    assert torch.equal(cast.cast_transposed(x, scale, dtype).float(), turned.float())
    assert torch.equal(cast.transpose_float8(x8).float(), turned.float())


@pytest.mark.parametrize(("rows", "lines"), [(True, False), (True, True), (False, True)])
def test_tiles_compile_for_hopper(rows: bool, lines: bool) -> None:
    """No form spills, and all stores, the turned one too, are 16 bytes a thread."""
    *tile, (_, warps) = kernels._EVEN.items()
    found = compiled(
        "cast:cast_tiles_kernel",
        {
            "x_ptr": "*bf16",
            "row_scale_ptr": "*fp32",
            "column_scale_ptr": "*fp32",
            "rows_ptr": "*fp8e4nv",
            "columns_ptr": "*fp8e4nv",
        },
        "m k",
        {
            "fmax": 448.0,
            "WRITE_ROWS": rows,
            "BY_LINE": lines,
            **dict(tile),
            "OVERLAPS": lines,
        },
        warps,
    )
    assert found["stack"] == 0
    assert found["neighbours"] == ["wait", "launch_dependents"] * lines
    assert found["registers"] <= (128 if lines else 72)  # four or seven programs of 4 warps a multiprocessor
    assert VECTOR_LOAD in found["accesses"]
    assert {access for access in found["accesses"] if access.startswith("st.")} == {VECTOR_STORE}


@pytest.mark.parametrize(("overlaps", "registers"), [(False, 64), (True, 80)])
def test_an_amax_and_its_cast_compile_for_hopper(overlaps: bool, registers: int) -> None:
    """Four programs of amax, eight or six of casts, fit on a multiprocessor.

    The scale and its inverse alone are stored by 4 bytes.
    """
    found = compiled(
        "amax:amax_kernel",
        {"x_ptr": "*bf16", "amaxes_ptr": "*fp32"},
        "n rounds",
        {"BLOCK": amaxes._ELEMENTS, "OVERLAPS": overlaps},
        8,
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64
    assert found["accesses"] == [VECTOR_LOAD, "st.global.b32"]
    assert found["neighbours"] == ["wait", "launch_dependents"] * overlaps
    pointers = {"x_ptr": "*bf16", "amaxes_ptr": "*fp32", "rows_ptr": "*fp8e5", "columns_ptr": "*fp8e5"}
    *tile, (_, warps) = kernels._EVEN.items()
    found = compiled(
        "cast:scale_and_cast_tiles_kernel",
        {**pointers, "scale_ptr": "*fp32", "inverse_ptr": "*fp32"},
        "m k",
        {
            "fmax": 57344.0,
            "PARTS": PARTS,
            **dict(tile),
            "OVERLAPS": overlaps,
        },
        warps,
    )
    assert found["stack"] == 0
    assert found["registers"] <= registers
    assert set(found["accesses"]) == {VECTOR_LOAD, VECTOR_STORE, "st.global.b32"}
    assert found["neighbours"] == ["wait", "launch_dependents"] * overlaps


@pytest.mark.parametrize(
    ("instruction", "undefined"),
    [
        ("LDC R1, c[0x0][0x28] ;", False),
        ("IADD3 R1, R1, -0x50, RZ ;", False),
        ("STL.64 [R1+0x8], R18 ;", False),
        ("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R10, R11, R12, R13 ;", False),
        ("LOP3.LUT R93, R1.reuse, 0xffff, RZ, 0xc0, !PT ;", True),
        ("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R63, R63, R90, R1 ;", True),
    ],
)
def test_an_undefined_register_is_seen(instruction: str, undefined: bool) -> None:
    assert reads_undefined(f"        /*0a10*/                   {instruction}") is undefined
