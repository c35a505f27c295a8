"""Norms in one pass: the reference against fp64, the Triton form against both."""

import math

import pytest
import torch

from kernels.norm import tensor_norms, tensor_norms_reference
from tests.kernels.hopper import compile_for_hopper

F32, BF16 = torch.float32, torch.bfloat16
BLOCK = {F32: 8192, BF16: 16384}
SIZES = [0, 1, 1023, 4097, 0, 16384, 8192, 8193, 40_000, 0]
"""Ends of accesses and blocks, whole blocks, several, and nothing: also first and last."""


def whole_numbers(sizes, dtype):
    """Tensors whose sums of squares are exact in fp32, in whatever order."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(-4, 5, (n,), generator=generator).to(dtype) for n in sizes]


def exact(tensors):
    """The nearest fp32 to each norm."""
    return torch.stack([t.double().norm().float() for t in tensors])


@pytest.fixture
def launched():
    """The Triton form on CPU tensors."""
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton is compiled here: tests/gpu has this")
    from kernels.triton.norm import launch

    return launch


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, torch.float64])
def test_on_a_cpu_norms_are_fp64(dtype):
    tensors = [torch.randn(1000).to(dtype), torch.zeros(0, 7).to(dtype), torch.randn(8, 9).to(dtype).t()]
    norms = tensor_norms(tensors)
    assert norms.dtype == torch.float64
    assert norms.tolist() == pytest.approx([float(t.double().norm()) for t in tensors], rel=1e-14)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_triton_form_is_exact_where_sums_are(launched, dtype):
    tensors = whole_numbers(SIZES, dtype)
    norms = launched(tensors)
    assert norms.dtype == F32
    assert norms.tolist() == exact(tensors).tolist()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tensors_that_begin_between_boundaries(launched, dtype):
    """What lies before and behind is another's: NaN here."""
    for shift in range(1, 16 // dtype.itemsize):
        hull = torch.full((2 * BLOCK[dtype] + 64,), math.nan, dtype=dtype)
        sizes = [1, 7, 2 * BLOCK[dtype]]
        tensors = []
        for n, values in zip(sizes, whole_numbers(sizes, dtype), strict=True):
            tensors.append(hull.clone()[16 + shift :][:n].copy_(values))
        assert tensors[0].data_ptr() % 16 == shift * dtype.itemsize
        assert launched(tensors).tolist() == exact(tensors).tolist()


def test_triton_form_of_random_numbers(launched):
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 1e-3 for n in SIZES]
    assert launched(tensors).tolist() == pytest.approx(tensor_norms(tensors).tolist(), rel=1e-6)


def test_more_blocks_than_are_added_at_a_time(launched, monkeypatch):
    """Of a tensor between others, so that its sums begin anywhere."""
    monkeypatch.setattr("kernels.triton.norm.ADDED", 8)
    tensors = whole_numbers([3, 20 * BLOCK[F32] + 5, 9, 8 * BLOCK[F32]], F32)
    assert launched(tensors).tolist() == exact(tensors).tolist()


def test_many_tensors_each_find_their_own(launched):
    tensors = whole_numbers([(7 * i) % 5 * 600 for i in range(40)], F32)
    assert launched(tensors).tolist() == exact(tensors).tolist()


def test_what_is_not_finite_stays_in_its_tensor(launched):
    tensors = whole_numbers([9000, 9000, 9000, 5], F32)
    tensors[0][8999], tensors[1][17], tensors[1][18] = -math.inf, math.nan, math.inf
    for norms in (launched(tensors), tensor_norms(tensors)):
        assert norms[0] == math.inf
        assert math.isnan(norms[1])
        assert norms[2:].tolist() == pytest.approx(exact(tensors[2:]).tolist(), rel=1e-7)


def test_nothing_but_empty_tensors(launched):
    assert launched([torch.zeros(0), torch.zeros(3, 0)]).tolist() == [0.0, 0.0]


def test_any_layout_of_elements(launched):
    grid = whole_numbers([64 * 48], F32)[0].view(64, 48)
    tensors = [grid.t(), grid[:, 3:7], grid[::2]]
    assert launched(tensors).tolist() == exact(tensors).tolist()


def test_the_operator_launches_the_kernel_where_triton_runs(launched, monkeypatch):
    monkeypatch.setattr("kernels.norm.runs_triton", lambda device: True)
    tensors = whole_numbers(SIZES, BF16)
    norms = tensor_norms(tensors)
    assert norms.dtype == F32  # the reference's are fp64 here
    assert norms.tolist() == exact(tensors).tolist()
    assert tensor_norms([t.half() for t in tensors]).dtype == torch.float64  # no kernel for it


def test_what_a_kernel_would_not_notice_is_refused():
    for wrong in ([], [torch.zeros(2), torch.zeros(2, dtype=BF16)]):
        with pytest.raises(ValueError, match="not of one device and dtype"):
            tensor_norms(wrong)


def test_torchs_checks_of_the_operator():
    tensors = [torch.randn(5), torch.randn(2, 3)]
    torch.library.opcheck(tensor_norms.overload, (tensors,), test_utils=("test_schema", "test_faketensor"))
    assert tensor_norms([t.to("meta") for t in tensors]).dtype == F32
    assert tensor_norms_reference(tensors).dtype == torch.float64


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_on_hopper_loads_are_wide_and_registers_few(dtype):
    pytest.importorskip("triton")
    from kernels.triton.norm import ACCESSES
    from kernels.triton.tensor_table import WARPS, block_size

    span = block_size([dtype.itemsize])
    assert ACCESSES * span == BLOCK[dtype]
    constants = {"BISECTIONS": 8, "BF16": dtype == BF16, "SPAN": span, "BLOCK": ACCESSES * span}
    signature = {"table": "*i64", "sums": "*fp32", "tensors": "i32", **dict.fromkeys(constants, "constexpr")}
    found = compile_for_hopper(
        "kernels.triton.norm:squares_kernel",
        signature,
        constants,
        num_warps=WARPS,
        aligned=("table", "sums"),
    )
    assert found["stack"] == 0  # nothing spills
    assert found["registers"] <= 40  # six programs of 8 warps on a multiprocessor, 96 KiB on their way
    loads = [access for access in found["accesses"] if access.startswith("ld")]
    assert any(access.endswith("v4.b32") for access in loads)


def test_on_hopper_the_second_kernel_does_not_spill():
    pytest.importorskip("triton")
    from kernels.triton.norm import ADDED
    from kernels.triton.tensor_table import WARPS

    signature = {"table": "*i64", "sums": "*fp32", "norms": "*fp32", "tensors": "i32", "blocks": "i32"}
    found = compile_for_hopper(
        "kernels.triton.norm:roots_kernel",
        signature | {"BLOCK": "constexpr"},
        {"BLOCK": ADDED},
        num_warps=WARPS,
        aligned=("table", "sums", "norms"),
    )
    assert found["stack"] == 0
