"""Cast kernels by Triton's interpreter, before they round to float8, and what their compiled form takes.

The interpreter's own conversion to float8 is wrong (it truncates and loses NaN), so kernels write fp32 here;
`tests/gpu/test_float8_kernels_gpu.py` compares the float8 elements with the reference, bit for bit.
"""

import math

import pytest
import torch

from kernels import cast
from kernels.scaling import compute_amax, float8_max, scale_from_amax

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("without the interpreter kernels need CUDA tensors: see tests/gpu", allow_module_level=True)

from kernels.triton import cast as kernels
from tests.kernels.hopper import compile_for_hopper

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIZES = [(1, 1), (3, 130), (130, 3), (257, 80)]


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) * 3).to(dtype)


def rounded_away(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is rounded to float8: the clamped product."""
    return torch.clamp(x.float() * scale, -float8_max(dtype), float8_max(dtype))


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and torch.equal(got.nan_to_num(123.0), want.nan_to_num(123.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1,), (5000,), (7, 11, 13), (3, 9000)])
def test_amax(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = sample(*size, dtype=dtype)
    got = kernels.amax(x)
    assert got.dtype is dtype
    assert torch.equal(got, compute_amax(x))


def test_a_program_of_amax_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_AMAX_PROGRAMS", 2)
    x = sample(5 * 8192 + 3)
    x[-1] = -100
    assert kernels.amax(x).item() == 100


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_amax_keeps_what_is_not_finite(bad: float) -> None:
    x = sample(300, dtype=torch.bfloat16)
    x[7], x[9] = bad, math.inf
    assert same(kernels.amax(x), compute_amax(x))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [(1,), (5000,), (3, 5, 7)])
def test_cast_float8(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, scale = sample(*size, dtype=torch.bfloat16), torch.tensor(1e4)
    x.view(-1)[0] = math.nan
    got = kernels.cast_float8(x, scale, dtype, stored_as=torch.float32)
    assert same(got, rounded_away(x, scale, dtype))
    assert got.nan_to_num(0).abs().max() <= float8_max(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_one_scale_both_layouts(size: tuple[int, int]) -> None:
    x, scale = sample(*size), torch.tensor(100.0)  # beyond 448 / 100 it saturates
    x[0, 0] = math.nan
    want = rounded_away(x, scale, E4M3)
    rows, columns = kernels.cast_both(x, scale, E4M3, stored_as=torch.float32)
    assert same(rows, want)
    assert same(columns, want.t())
    assert columns.is_contiguous()
    assert same(kernels.cast_transposed(x, scale, E4M3, stored_as=torch.float32), want.t())


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (2, 9000)])
def test_scales_by_row_and_by_column(size: tuple[int, int], power_of_2: bool) -> None:
    x = sample(*size, dtype=torch.bfloat16)
    by_row, by_column = (scale_from_amax(compute_amax(x, dim), E4M3, power_of_2) for dim in (-1, 0))
    rows, row_scale, columns, column_scale = kernels.cast_rows_and_columns(
        x, E4M3, power_of_2, stored_as=torch.float32
    )
    assert torch.equal(row_scale, by_row)
    assert torch.equal(column_scale, by_column)
    assert same(rows, rounded_away(x, by_row, E4M3))
    assert same(columns, rounded_away(x, by_column, E4M3).t())
    for alone, together in (
        (kernels.cast_rows(x, E4M3, power_of_2, stored_as=torch.float32), (rows, row_scale)),
        (kernels.cast_columns(x, E4M3, power_of_2, stored_as=torch.float32), (columns, column_scale)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_of_edge_values(dtype: torch.dtype, power_of_2: bool) -> None:
    """A row of one value each, so that its scale is made of that amax."""
    near_one = [448.0 * (1 - 2.0**-24), 448.0 * (1 + 2.0**-23), 57344 / (1 - 2.0**-24)]
    amaxes = [0, 1, 3, 448, 57344, 1e-12, 1e-13, 2e-12, 2.0**-149, 2.0**-126, 3.4e38, math.inf, math.nan]
    x = torch.tensor([*amaxes, *near_one, *(torch.rand(200) * 1e-3).tolist()]).reshape(-1, 1)
    want = scale_from_amax(x, dtype, power_of_2)
    assert same(kernels.cast_rows(x, dtype, power_of_2, stored_as=torch.float32)[1], want)
    assert same(kernels.cast_columns(x.t(), dtype, power_of_2, stored_as=torch.float32)[1], want.t())


def test_bad_values_stay_in_their_row_and_column() -> None:
    x = sample(5, 40)
    x[1, 2], x[3, 4] = math.nan, math.inf
    rows, _, columns, _ = kernels.cast_rows_and_columns(x, E4M3, True, stored_as=torch.float32)
    assert rows.isnan().nonzero()[:, 0].unique().tolist() == [1, 3]
    assert rows[3, 4].isnan()
    assert columns.isnan().nonzero()[:, 0].unique().tolist() == [2, 4]
    assert not rows[[0, 2, 4]].isnan().any()


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


@pytest.mark.parametrize("k", [1, 1024, 4096, 14336, 28672, 131072])
def test_rows_of_a_program(k: int) -> None:
    rows = kernels.rows_of_a_program(k)
    assert rows == 1 or rows * k <= 65536
    assert {1: 32, 1024: 32, 4096: 16, 14336: 4, 28672: 2, 131072: 1}[k] == rows


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
        (cast.cast_transposed, (x, scale, dtype)),
        (cast.transpose_float8, (x8,)),
        (cast.cast_rows, (x, dtype, True)),
        (cast.cast_columns, (x, dtype, True)),
        (cast.cast_rows_and_columns, (x, dtype, True)),
    )
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")
    both, turned = cast.cast_both(x, scale, dtype)
    assert torch.equal(
        both.float(), torch.clamp(x.float() * 7, -float8_max(dtype), float8_max(dtype)).to(dtype).float()
    )
    assert torch.equal(turned.float(), both.float().t())
    assert torch.equal(cast.cast_transposed(x, scale, dtype).float(), turned.float())
    assert torch.equal(cast.transpose_float8(x8).float(), turned.float())


POINTERS = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "column_amax_ptr": "*i32", "rows_ptr": "*fp8e4nv"}
VECTOR_LOAD, VECTOR_STORE = "ld.global.v4.b32", "st.global.v4.b32"


@pytest.mark.parametrize("by_column", [False, True])
def test_tiles_compile_for_hopper(by_column: bool) -> None:
    """Neither form spills, and both stores, the transposed one too, are 16 bytes a thread."""
    signature = {
        **POINTERS,
        "columns_ptr": "*fp8e4nv",
        "m": "i32",
        "k": "i32",
        **dict.fromkeys(("fmax", "power_of_2", "WRITE_ROWS", "BY_COLUMN", "TILE"), "constexpr"),
    }
    constants = {
        "fmax": 448.0,
        "power_of_2": by_column,
        "WRITE_ROWS": not by_column,
        "BY_COLUMN": by_column,
        "TILE": kernels._TILE,
    }
    found = compile_for_hopper(
        "kernels.triton.cast:cast_tiles_kernel",
        signature,
        constants,
        num_warps=kernels._TILE_WARPS,
        aligned=(*POINTERS, "columns_ptr", "m", "k"),
    )
    assert found["stack"] == 0
    assert found["registers"] <= 80  # three programs a multiprocessor
    assert VECTOR_LOAD in found["accesses"]
    stores = [access for access in found["accesses"] if access.startswith("st.")]
    # A tile's scales are a float a thread; its elements are not.
    assert stores == ([VECTOR_STORE] if not by_column else ["st.global.b32", VECTOR_STORE])


def test_rows_compile_for_hopper() -> None:
    rows = kernels.rows_of_a_program(4096)
    chunk = kernels._ROW_CHUNK // rows
    found = compile_for_hopper(
        "kernels.triton.cast:cast_rows_kernel",
        {
            **{name: POINTERS[name] for name in ("x_ptr", "rows_ptr", "scale_ptr", "column_amax_ptr")},
            "m": "i32",
            "k": "i32",
            **dict.fromkeys(("fmax", "power_of_2", "COLUMNS", "ROWS", "CHUNK", "CHUNKS"), "constexpr"),
        },
        {
            "fmax": 448.0,
            "power_of_2": True,
            "COLUMNS": True,
            "ROWS": rows,
            "CHUNK": chunk,
            "CHUNKS": 4096 // chunk,
        },
        num_warps=kernels._ROW_WARPS,
        aligned=(*POINTERS, "m", "k"),
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64  # two programs of 16 warps a multiprocessor
    assert {VECTOR_LOAD, VECTOR_STORE} <= set(found["accesses"])
