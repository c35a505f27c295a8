"""Casts with scales by row and column by Triton's interpreter, before they round, and their compiled form."""

import math

import pytest
import torch

from kernels import cast
from kernels.scaling import compute_amax, inverse_scale, scale_from_amax

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("without the interpreter kernels need CUDA tensors: see tests/gpu", allow_module_level=True)

from kernels.triton import cast_by_line as by_line
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
from tests.kernels.hopper import compile_for_hopper


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (2, 9000)])
def test_scales_by_row_and_by_column(size: tuple[int, int], power_of_2: bool, dtype: torch.dtype) -> None:
    x = sample(*size, dtype=dtype)
    by_row, by_column = (scale_from_amax(compute_amax(x, dim), E4M3, power_of_2) for dim in (-1, 0))
    rows = (rounded_away(x, by_row, E4M3), by_row, inverse_scale(by_row))
    columns = (rounded_away(x, by_column, E4M3).t(), by_column, inverse_scale(by_column))
    assert all_same(by_line.cast_rows(x, E4M3, power_of_2, torch.float32), rows)
    assert all_same(by_line.cast_columns(x, E4M3, power_of_2, torch.float32), columns)
    both = by_line.cast_rows_and_columns(x, E4M3, power_of_2, torch.float32)
    assert all_same(both, rows + columns)


@pytest.mark.parametrize("size", [(453, 20), (2311, 20), (40, 2100)])
def test_amaxes_of_parts_become_one(size: tuple[int, int]) -> None:
    """Of several levels, of more parts than a program looks at at a time, the last ones not all there."""
    x = sample(*size, dtype=torch.bfloat16)
    x[-1, 7], x[0, -1], x[size[0] // 2, 3] = -100, math.inf, 50
    columns, column_inverse, rows, row_inverse = by_line._scales(x, E4M3, False, by_row=True)
    assert torch.equal(columns, scale_from_amax(compute_amax(x, 0), E4M3))
    assert torch.equal(rows, scale_from_amax(compute_amax(x, -1), E4M3))
    assert torch.equal(column_inverse, inverse_scale(columns))
    assert torch.equal(row_inverse, inverse_scale(rows))
    assert (columns[0, 7].item(), columns[0, 3].item()) == (
        torch.tensor(4.48).item(),
        torch.tensor(8.96).item(),
    )


def test_a_row_longer_than_registers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_line, "_ROW_CHUNK", 64)
    x = sample(3, 141, dtype=torch.bfloat16)
    x[0, 0], x[1, 70], x[2, 140] = 50, -60, 70
    assert by_line.rows_of_a_program(141)[1] == 32
    rows, scale, inverse = by_line.cast_rows(x, E4M3, False, stored_as=torch.float32)
    assert torch.equal(scale, scale_from_amax(compute_amax(x, -1), E4M3))
    assert torch.equal(inverse, inverse_scale(scale))
    assert same(rows, rounded_away(x, scale, E4M3))


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_of_edge_values(dtype: torch.dtype, power_of_2: bool) -> None:
    """A row of one value each, so that its scale is made of that amax, and the inverse of that scale."""
    near_one = [448.0 * (1 - 2.0**-24), 448.0 * (1 + 2.0**-23), 57344 / (1 - 2.0**-24)]
    amaxes = [0, 1, 3, 448, 57344, 1e-12, 1e-13, 2e-12, 2.0**-149, 2.0**-126, 3.4e38, math.inf, math.nan]
    x = torch.tensor([*amaxes, *near_one, *(torch.rand(200) * 1e-3).tolist()]).reshape(-1, 1)
    scale = scale_from_amax(x, dtype, power_of_2)
    want = (scale, inverse_scale(scale))
    assert all_same(by_line.cast_rows(x, dtype, power_of_2, torch.float32)[1:], want)
    turned = (scale.t(), inverse_scale(scale).t())
    assert all_same(by_line.cast_columns(x.t(), dtype, power_of_2, torch.float32)[1:], turned)
    # Both in one pass take scales of rows from another kernel, if elements have 2 bytes.
    x = x.to(torch.bfloat16)
    scale = scale_from_amax(x, dtype, power_of_2)
    both = by_line.cast_rows_and_columns(x, dtype, power_of_2, torch.float32)
    assert all_same(both[1:3], (scale, inverse_scale(scale)))


def test_bad_values_stay_in_their_row_and_column() -> None:
    x = sample(5, 40, dtype=torch.bfloat16)
    x[1, 2], x[3, 4] = math.nan, math.inf
    made = by_line.cast_rows_and_columns(x, E4M3, True, stored_as=torch.float32)
    rows, columns = made[0], made[3]
    assert rows.isnan().nonzero()[:, 0].unique().tolist() == [1, 3]
    assert rows[3, 4].isnan()
    assert columns.isnan().nonzero()[:, 0].unique().tolist() == [2, 4]
    assert not rows[[0, 2, 4]].isnan().any()
    want = *cast.cast_rows_reference(x, E4M3, True)[1:], *cast.cast_columns_reference(x, E4M3, True)[1:]
    assert all_same((*made[1:3], *made[4:]), want)
    assert made[2][3] == math.inf  # of a scale that is 0


@pytest.mark.parametrize(
    ("k", "rows", "chunk", "warps"),
    [
        (1, 8192, 1, 8),
        (1024, 8, 1024, 8),
        (4096, 2, 4096, 8),
        (14336, 1, 16384, 16),
        (28672, 1, 32768, 16),
        (128256, 1, 16384, 16),
    ],
)
def test_rows_of_a_program(k: int, rows: int, chunk: int, warps: int) -> None:
    assert by_line.rows_of_a_program(k) == (rows, chunk, warps)


@pytest.mark.parametrize("overlaps", [False, True])
def test_amaxes_of_lines_and_their_scales_compile_for_hopper(overlaps: bool) -> None:
    *tile, (_, warps) = by_line._AMAXES.items()
    found = compiled(
        "cast_by_line:amaxes_kernel",
        {"x_ptr": "*bf16", "amaxes_ptr": "*i32"},
        "m k",
        {"BY_ROW": True, **dict(tile), "OVERLAPS": overlaps},
        warps,
    )
    assert found["stack"] == 0
    assert found["registers"] <= 128  # eight programs of 2 warps a multiprocessor
    assert VECTOR_LOAD in found["accesses"]
    assert not any(access.startswith("ld.") for access in found["accesses"] if access != VECTOR_LOAD)
    assert found["neighbours"] == ["wait", "launch_dependents"] * overlaps
    scales = ("column_scale_ptr", "column_inverse_ptr", "row_scale_ptr", "row_inverse_ptr")
    found = compiled(
        "cast_by_line:scales_kernel",
        {"amaxes_ptr": "*i32", **dict.fromkeys(scales, "*fp32")},
        "m k down across",
        {
            "fmax": 448.0,
            "power_of_2": False,
            "BLOCK": by_line._SCALES,
            "PARTS": by_line._PARTS,
            "OVERLAPS": overlaps,
        },
        4,
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64
    assert VECTOR_LOAD in found["accesses"]
    assert found["neighbours"] == ["wait", "launch_dependents"] * overlaps


@pytest.mark.parametrize("k", [4096, 14336])
def test_rows_compile_for_hopper(k: int) -> None:
    rows, chunk, warps = by_line.rows_of_a_program(k)
    found = compiled(
        "cast_by_line:cast_rows_kernel",
        {"x_ptr": "*bf16", "rows_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "inverse_ptr": "*fp32"},
        "m k",
        {"fmax": 448.0, "power_of_2": True, "ROWS": rows, "CHUNK": chunk, "CHUNKS": 1},
        warps,
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64  # 32 warps a multiprocessor
    assert {VECTOR_LOAD, VECTOR_STORE} <= set(found["accesses"])


@pytest.mark.parametrize("ones", [{"m", "down"}, {"k", "across"}, {"m", "k", "down", "across"}])
def test_sizes_of_one_compile(ones: set[str]) -> None:
    """Triton makes constants of them, and a constant is no tensor."""

    def sizes(*names: str) -> dict[str, str]:
        return {name: "constexpr" if name in ones else "i32" for name in names}

    *tile, (_, warps) = by_line._AMAXES.items()
    constants = {"BY_ROW": True, **dict(tile), "OVERLAPS": True}
    compile_for_hopper(
        "kernels.triton.cast_by_line:amaxes_kernel",
        {"x_ptr": "*bf16", "amaxes_ptr": "*i32", **sizes("m", "k"), **dict.fromkeys(constants, "constexpr")},
        {**dict.fromkeys(ones & {"m", "k"}, 1), **constants},
        num_warps=warps,
    )
    scales = ("column_scale_ptr", "column_inverse_ptr", "row_scale_ptr", "row_inverse_ptr")
    constants = {"fmax": 448.0, "power_of_2": True, "BLOCK": 64, "PARTS": 16, "OVERLAPS": True}
    compile_for_hopper(
        "kernels.triton.cast_by_line:scales_kernel",
        {
            "amaxes_ptr": "*i32",
            **dict.fromkeys(scales, "*fp32"),
            **sizes("m", "k", "down", "across"),
            **dict.fromkeys(constants, "constexpr"),
        },
        {**dict.fromkeys(ones, 1), **constants},
    )
