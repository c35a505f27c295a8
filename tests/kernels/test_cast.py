"""Cast kernels by Triton's interpreter, before they round to float8, and what their compiled form takes.

The interpreter's own conversion to float8 is wrong (it truncates and loses NaN), so kernels write fp32 here;
`tests/gpu/test_float8_kernels_gpu.py` compares the float8 elements with the reference, bit for bit.
"""

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
from kernels.triton import cast_by_line as by_line
from tests.kernels.hopper import compile_for_hopper, reads_undefined

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIZES = [(1, 1), (3, 130), (130, 3), (257, 80)]
PARTS = amaxes.PARTS


@pytest.fixture(autouse=True)
def _few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds a program, were it idle."""
    monkeypatch.setattr(amaxes, "PARTS", 4)


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) * 3).to(dtype)


def rounded_away(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is rounded to float8: the clamped product."""
    return torch.clamp(x.float() * scale, -float8_max(dtype), float8_max(dtype))


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    without_nan = (t.nan_to_num(123.0, math.inf, -math.inf) for t in (got, want))
    return got.shape == want.shape and torch.equal(*without_nan)


def all_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return all(same(*pair) for pair in zip(got, want, strict=True))


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


VECTOR_LOAD, VECTOR_STORE = "ld.global.v4.b32", "st.global.v4.b32"


def compiled(
    kernel: str, pointers: dict[str, str], sizes: str, constants: dict[str, object], warps: int
) -> dict[str, object]:
    """`kernel` for Hopper, with all that can be a multiple of 16."""
    names = sizes.split()
    signature = {**pointers, **dict.fromkeys(names, "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = [name for name in (*pointers, *names) if name != "rounds"]
    return compile_for_hopper(
        f"kernels.triton.{kernel}", signature, constants, num_warps=warps, aligned=tuple(aligned)
    )


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


@pytest.mark.parametrize("overlaps", [False, True])
def test_amaxes_of_lines_and_their_scales_compile_for_hopper(overlaps: bool) -> None:
    *tile, (_, warps) = by_line._AMAXES.items()
    found = compiled(
        "cast_by_line:amaxes_kernel",
        {"x_ptr": "*bf16", "amaxes_ptr": "*i32"},
        "m k depth",
        {"BY_ROW": True, **dict(tile), "OVERLAPS": overlaps},
        warps,
    )
    assert found["stack"] == 0
    assert found["registers"] <= 128  # eight programs of 2 warps a multiprocessor
    assert VECTOR_LOAD in found["accesses"]
    assert not any(access.startswith("ld.") for access in found["accesses"] if access != VECTOR_LOAD)
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
