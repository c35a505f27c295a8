"""The cast of many tensors in one launch, by Triton's interpreter before it rounds, and what it compiles to.

The interpreter's own conversion to float8 is wrong; `tests/gpu/test_float8_kernels_gpu.py` compares elements.
"""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from kernels import cast

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("without the interpreter kernels need CUDA tensors: see tests/gpu", allow_module_level=True)

from kernels.triton import cast_each as each
from tests.kernels.casts import E4M3, E5M2, VECTOR_LOAD, VECTOR_STORE, rounded_away, sample
from tests.kernels.hopper import compile_for_hopper

BLOCK = each._ELEMENTS
SIZES = [(0,), (1,), (3, 5), (BLOCK,), (2, BLOCK), (2, 0), (BLOCK + 2,), (BLOCK - 1,)]
"""Whole blocks, ends of blocks, several blocks, and nothing."""


def many(dtype: torch.dtype, shift: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors and scales; with a shift they begin between 16-byte boundaries."""
    hulls = [sample(math.prod(size) + shift, dtype=dtype) for size in SIZES]
    tensors = [hull[shift:].view(size) for hull, size in zip(hulls, SIZES, strict=True)]
    return tensors, list(torch.linspace(0.5, 40.0, len(SIZES)).unbind())


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_of_many_tensors_is_cast_in_one_launch(dtype: torch.dtype, shift: int) -> None:
    tensors, scales = many(dtype, shift)
    outs = [torch.full((t.numel() + 2 * shift + 1,), math.nan)[2 * shift :] for t in tensors]
    places = [out[: t.numel()] for out, t in zip(outs, tensors, strict=True)]
    launches: list[int] = []
    real = each.cast_each_kernel.run
    with mock.patch.object(each.cast_each_kernel, "run", lambda *a, **k: launches.append(1) or real(*a, **k)):
        each.launch(places, tensors, scales, E4M3, stored_as=torch.float32)
    assert len(launches) == 1
    for out, t, scale in zip(outs, tensors, scales, strict=True):
        assert torch.equal(out[: t.numel()], rounded_away(t, scale, E4M3).view(-1))
        assert out[t.numel() :].isnan().all()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "to"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_without_scales_elements_are_as_they_were(dtype: torch.dtype, to: torch.dtype, shift: int) -> None:
    """Where none has to be rounded, which the interpreter would do by truncation; NaN and infinity stay."""
    tensors, _ = many(dtype, shift)
    for t in tensors:
        t.view(-1)[:3] = torch.tensor([math.inf, -math.inf, math.nan])[: t.numel()]
        t.copy_(t.bfloat16() if torch.bfloat16 in (dtype, to) else t)
    outs = [torch.full((t.numel() + 2 * shift + 1,), 7.0, dtype=to)[2 * shift :] for t in tensors]
    each.launch([out[: t.numel()] for out, t in zip(outs, tensors, strict=True)], tensors, [], to)
    for out, t in zip(outs, tensors, strict=True):
        torch.testing.assert_close(out[: t.numel()], t.view(-1).to(to), rtol=0, atol=0, equal_nan=True)
        assert out[t.numel() :].eq(7).all()


def test_a_table_is_sent_once() -> None:
    tensors, scales = many(torch.float32, 0)
    outs = [torch.zeros(t.numel()) for t in tensors]
    each.launch(outs, tensors, scales, E4M3, stored_as=torch.float32)
    sent = each._table.cache_info().misses
    tensors[-1].mul_(2)
    scales = list((2 * torch.stack(scales)).unbind())  # new ones, as far apart
    each.launch(outs, tensors, scales, E4M3, stored_as=torch.float32)
    assert each._table.cache_info().misses == sent
    assert torch.equal(outs[-1], rounded_away(tensors[-1], scales[-1], E4M3))
    each.launch(outs[::-1], tensors[::-1], scales[::-1], E4M3, stored_as=torch.float32)
    assert each._table.cache_info().misses == sent + 1


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_without_a_gpu_each_tensor_is_cast_by_torch(dtype: torch.dtype) -> None:
    """Into memory that is called something else."""
    tensors, scales = many(torch.bfloat16, 0)
    tensors = [t for t in tensors if t.numel() % 2 == 0]
    scales = scales[: len(tensors)]
    outs = [torch.zeros(t.numel() // 2, dtype=torch.bfloat16) for t in tensors]
    cast.cast_each_into(outs, tensors, scales, dtype)
    for out, t, scale in zip(outs, tensors, scales, strict=True):
        want = cast.cast_float8(t, scale, dtype)
        assert torch.equal(out.view(torch.uint8), want.view(torch.uint8).view(-1))
    torch.library.opcheck(
        cast.cast_each_into, (outs, tensors, scales, dtype), test_utils=("test_schema", "test_faketensor")
    )
    cast.cast_each_into([], [], [], dtype)


def test_without_a_gpu_and_without_scales_torch_rounds() -> None:
    """To nearest, ties to even, also into memory that is called something else."""
    tensors, _ = many(torch.float32, 1)
    outs = [torch.zeros(2 * t.numel(), dtype=torch.uint8) for t in tensors]
    arguments = (outs, tensors, [], torch.bfloat16)
    cast.cast_each_into(*arguments)
    for out, t in zip(outs, tensors, strict=True):
        assert torch.equal(out.view(torch.bfloat16), t.view(-1).bfloat16())
    torch.library.opcheck(cast.cast_each_into, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outs": []}, "1 tensors to torch.float8_e4m3fn, 1 scales, 0 outputs"),
        ({"outs": [torch.zeros(31, dtype=torch.uint8)]}, "into 31 bytes"),
        ({"scales": [torch.ones((), dtype=torch.float64)]}, "a scale torch.float64"),
        ({"tensors": [torch.ones(8, 4).t()]}, "not contiguous"),
        ({"tensors": [torch.ones(32, device="meta")]}, "several devices"),
        ({"scales": []}, "1 tensors to torch.float8_e4m3fn, 0 scales"),
        ({"dtype": torch.bfloat16}, "1 tensors to torch.bfloat16, 1 scales"),
        ({"dtype": torch.bfloat16, "scales": []}, "as torch.bfloat16 into 32 bytes"),
        (
            {"dtype": torch.bfloat16, "scales": [], "outs": [torch.zeros(66, dtype=torch.uint8)[1:65]]},
            "between two elements",
        ),
    ],
)
def test_what_cannot_be_cast_together_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "outs": [torch.zeros(32, dtype=torch.uint8)],
        "tensors": [torch.ones(4, 8)],
        "scales": [torch.ones(())],
        "dtype": E4M3,
    }
    with pytest.raises(ValueError, match=message):
        cast._check_each(**arguments | change)
    with pytest.raises(ValueError, match="several devices or dtypes"):
        cast._check_each(*([t, t.bfloat16()] for t in torch.ones(3, 1).unbind()), E4M3)


@pytest.mark.parametrize(("out", "fmax"), [("*fp8e4nv", 448.0), ("*bf16", None)])
def test_the_cast_of_many_compiles_for_hopper(out: str, fmax: float | None) -> None:
    constants = {"fmax": fmax, "BISECTIONS": 4, "BLOCK": BLOCK}
    found = compile_for_hopper(
        "kernels.triton.cast_each:cast_each_kernel",
        {
            "table": "*i64",
            "first_ptr": "*fp32",
            "first_out_ptr": out,
            "scale_ptr": "*fp32",
            "tensors": "i32",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants,
        num_warps=8,
        aligned=("table",),
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64  # four programs of 8 warps on a multiprocessor
    assert {VECTOR_LOAD, VECTOR_STORE} <= set(found["accesses"])
