"""RMSNorm kernels: reference against `nn.RMSNorm`, Triton (interpreted) against the reference, ptxas."""

import math

import pytest
import torch
from torch import nn

from kernels.rms_norm import (
    _forward,
    add_rms_norm,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
    rms_norm_with_amax,
)
from tests.kernels.hopper import compile_for_hopper

EPS = 1e-5


def inputs(M, D, dtype=torch.float32, count=4):
    torch.manual_seed(M + D)
    return [torch.randn(M, D).to(dtype) for _ in range(count)], (1 + torch.randn(D) / 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_pytorchs(dtype):
    (x, r, _, _), weight = inputs(6, 40, dtype)
    norm = nn.RMSNorm(40, eps=EPS, dtype=dtype)
    norm.weight.data.copy_(weight)
    plain, fused = ([x.clone().requires_grad_(), r.clone().requires_grad_()] for _ in range(2))
    own = weight.clone().requires_grad_()
    h = plain[0] + plain[1]
    want = [h, norm(h)]
    got = add_rms_norm(*fused, own, EPS)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    for both in (want, got):
        (both[0].float().square().sum() + both[1].float().pow(3).sum()).backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for mine, theirs in zip([*fused, own], [*plain, norm.weight], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)
    torch.testing.assert_close(rms_norm(x, weight, EPS), norm(x))


def test_the_stream_alone_and_the_norm_alone_get_gradients():
    (x, r, _, _), weight = inputs(3, 8)
    for which in (0, 1):
        leaves = [t.clone().requires_grad_() for t in (x, r, weight)]
        (add_rms_norm(*leaves, EPS)[which] ** 2).sum().backward()
        again = [t.clone().requires_grad_() for t in (x, r, weight)]
        h = again[0] + again[1]
        y = nn.functional.rms_norm(h, (8,), again[2], EPS)
        ((h, y)[which] ** 2).sum().backward()
        for mine, theirs in zip(leaves, again, strict=True):
            want = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            got = torch.zeros_like(theirs) if mine.grad is None else mine.grad
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("M", "D"), [(1, 1), (3, 5), (7, 512), (4, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_reference(M, D, dtype, monkeypatch):
    import kernels.triton.rms_norm
    from kernels.triton.rms_norm import launch_backward, launch_forward

    # One multiprocessor: a program has several rows, where a row is long enough, and all of M = 4 or 7.
    monkeypatch.setattr(kernels.triton.rms_norm, "chip_of", lambda device: (1, 2**17))
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    (x, r, grad, stream), weight = inputs(M, D, dtype)
    amax = torch.zeros(1)
    h, y, rstd = launch_forward(x, r, weight, EPS, amax)
    torch.testing.assert_close(h, x + r, **tolerance)  # the interpreter does not round bf16 to nearest
    want_y, want_rstd = rms_norm_reference(h, weight, EPS)
    torch.testing.assert_close(y, want_y, **tolerance)
    torch.testing.assert_close(rstd, want_rstd)
    assert float(amax) == float(y.abs().max())
    none, alone, _ = launch_forward(h, None, weight, EPS, None)
    assert none is None
    assert torch.equal(alone, y)
    for added, grads in ((None, [grad]), (stream, [grad]), (stream, [grad, x]), (None, [x, grad, stream])):
        amax = torch.zeros(1)
        dx, dw = launch_backward(grads, h, weight, rstd, added, amax)
        assert float(amax) == float(dx.abs().max())
        assert all(map(torch.equal, launch_backward(grads, h, weight, rstd, added, None), (dx, dw)))
        want_dx, want_dw = rms_norm_backward_reference(grads, h, weight, rstd, added)
        torch.testing.assert_close(dx, want_dx, **tolerance)
        torch.testing.assert_close(dw, want_dw, rtol=tolerance["rtol"], atol=1e-4)


def test_no_rows_and_an_amax():
    from kernels.triton.rms_norm import launch_backward, launch_forward

    (x, _, _, _), weight = inputs(0, 8)
    h, y, rstd = launch_forward(x, x, weight, EPS, None)
    assert h.shape == y.shape == (0, 8)
    dx, dw = launch_backward([x], x, weight, rstd, None, torch.zeros(1))
    assert dx.shape == (0, 8)
    assert dw.tolist() == [0.0] * 8
    (x, _, _, _), weight = inputs(4, 8)
    y, amax = rms_norm_with_amax(x, weight, EPS)
    assert float(amax) == float(y.abs().max())
    dx, _, amax = rms_norm_backward([y], x, weight, torch.rand(4), None, True)
    assert float(amax) == float(dx.abs().max())
    assert rms_norm_backward([x[:0]], x[:0], weight, torch.rand(0), None, True)[2].tolist() == [0.0]


def test_amax_of_what_lies_inside_alone():
    from kernels.triton.rms_norm import launch_backward

    grad, x = torch.full((2, 1, 5), 3e38)  # their product is infinite, and so is a row's sum
    amax = torch.zeros(1)
    dx, _ = launch_backward([grad], x, torch.ones(5), torch.ones(1), None, amax)
    assert dx.tolist() == [[-math.inf] * 5]
    assert float(amax) == math.inf  # not the NaN of zero times it beyond the row's end


def test_operators_compose_with_the_compiler():
    (x, r, grad, stream), weight = inputs(4, 8)
    leaves = [t.requires_grad_() for t in (x, r, weight)]
    torch.library.opcheck(_forward.overload, (*leaves, EPS, True))
    torch.library.opcheck(_forward.overload, (x, None, weight, EPS, False))
    rstd = torch.rand(4)
    torch.library.opcheck(
        rms_norm_backward.overload, ([grad], x.detach(), weight.detach(), rstd, stream, True)
    )


@pytest.mark.parametrize(
    ("D", "grads", "dtype", "stages"),
    [
        (4096, 1, "bf16", 4),
        (4096, 3, "bf16", 4),
        (2048, 2, "bf16", 4),
        pytest.param(8192, 3, "bf16", 3, marks=pytest.mark.slow),
        pytest.param(8192, 3, "fp32", 2, marks=pytest.mark.slow),
        pytest.param(16384, 3, "bf16", 1, marks=pytest.mark.slow),
    ],
)
def test_hopper_fetches_rows_ahead_without_spilling(D, grads, dtype, stages):
    from kernels.triton.rms_norm import _WARPS, block_and_warps, programs_and_stages

    block, warps = block_and_warps(D)
    row_bytes = (grads + 3) * block * (2 if dtype == "bf16" else 4)
    programs, found_stages = programs_and_stages(D, row_bytes, torch.device("cpu"))
    assert found_stages == stages
    tensors = dict.fromkeys(("grad", "second_grad", "third_grad", "x", "weight"), f"*{dtype}")
    signature = {
        **tensors,
        "rstd": "*fp32",
        "stream_grad": f"*{dtype}",
        "grad_x": f"*{dtype}",
        "grad_weight_parts": "*fp32",
        "amax": "*i32",
        **dict.fromkeys(("M", "D"), "i32"),
        **dict.fromkeys(("GRADS", "WITH_STREAM", "WITH_AMAX", "ROWS", "STAGES", "BLOCK"), "constexpr"),
    }
    constants = {"GRADS": grads, "WITH_STREAM": True, "WITH_AMAX": True, "ROWS": 63, "BLOCK": block}
    constants["STAGES"] = stages
    found = compile_for_hopper(
        "kernels.triton.rms_norm:backward_kernel",
        signature,
        constants,
        num_warps=warps,
        aligned=tuple(name for name in signature if name not in constants),
    )
    assert found["stack"] == 0
    together = programs // 132
    assert together == max(1, _WARPS // warps)
    assert found["shared"] * together <= 227 * 1024
    assert (stages - 1) * row_bytes <= found["shared"]
    assert ("ld.global.v4.b32" in found["accesses"]) == (
        stages == 1
    )  # the others are copied to shared memory
    assert "st.global.v4.b32" in found["accesses"]


@pytest.mark.parametrize(("P", "D"), [(1, 1), (3, 70), (70, 33), (200, 16)])
def test_parts_are_added(P, D):
    from kernels.triton.rms_norm import _COLUMNS, _PARTS, add_parts_kernel

    torch.manual_seed(P)
    parts, out = torch.randn(P, D), torch.empty(D)
    add_parts_kernel[(-(-D // _COLUMNS),)](parts, out, P, D, COLUMNS=_COLUMNS, PARTS=_PARTS)
    torch.testing.assert_close(out, parts.sum(0))
