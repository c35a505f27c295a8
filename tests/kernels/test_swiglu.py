"""SwiGLU kernels: reference against autograd, Triton (interpreted) against the reference, amax, ptxas."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.swiglu import (
    _forward,
    silu_mul,
    silu_mul_backward,
    silu_mul_backward_reference,
    silu_mul_reference,
    silu_mul_with_amax,
)
from tests.kernels.hopper import compile_for_hopper


def inputs(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def test_value_and_gradients_are_autograds():
    _, gate, up = inputs(3, 5, 7)
    leaves = [t.clone().requires_grad_() for t in (gate, up, gate, up)]
    want, got = F.silu(leaves[0]) * leaves[1], silu_mul(leaves[2], leaves[3])
    torch.testing.assert_close(got, want)
    for y in (want, got):
        (y * y).sum().backward()
    for a, b in ((0, 2), (1, 3)):
        torch.testing.assert_close(leaves[b].grad, leaves[a].grad)


@pytest.mark.parametrize("shape", [(1,), (5, 7), (4096,), (3, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_reference(shape, dtype):
    from kernels.triton.swiglu import launch_backward, launch_forward

    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    grad, gate, up = inputs(*shape, dtype=dtype)
    amax, amaxes = torch.zeros(1), torch.zeros(2)
    y = launch_forward(gate, up, amax)
    torch.testing.assert_close(y, silu_mul_reference(gate, up), **tolerance)
    assert float(amax) == float(y.abs().max())
    grads = launch_backward(grad, gate, up, amaxes)
    for mine, want in zip(grads, silu_mul_backward_reference(grad, gate, up), strict=True):
        torch.testing.assert_close(mine, want, **tolerance)
    assert amaxes.tolist() == [float(g.abs().max()) for g in grads]
    assert torch.equal(launch_forward(gate, up, None), y)
    assert all(map(torch.equal, launch_backward(grad, gate, up, None), grads))


def test_amax_knows_infinity_and_nan():
    from kernels.triton.swiglu import launch_forward

    gate, up = torch.ones(5000), torch.ones(5000)
    up[4999] = -math.inf
    amax = torch.zeros(1)
    launch_forward(gate, up, amax)
    assert float(amax) == math.inf
    up[3] = math.nan  # in another program
    launch_forward(gate, up, amax)
    assert math.isnan(float(amax))


def test_nothing_in_nothing_out():
    from kernels.triton.swiglu import launch_backward, launch_forward

    none = torch.empty(0, 8)
    assert launch_forward(none, none, torch.zeros(1)).shape == (0, 8)
    assert launch_backward(none, none, none, None)[1].shape == (0, 8)
    assert silu_mul_with_amax(none, none)[1].tolist() == [0.0]


def test_operators_compose_with_the_compiler():
    grad, gate, up = inputs(4, 8)
    torch.library.opcheck(_forward.overload, (gate.requires_grad_(), up.requires_grad_(), True))
    torch.library.opcheck(silu_mul_backward.overload, (grad, gate.detach(), up.detach(), True))


def test_amax_stands_beside_the_result():
    _, gate, up = inputs(6, 8, dtype=torch.bfloat16)
    gate.requires_grad_()
    y, amax = silu_mul_with_amax(gate, up)
    assert float(amax.detach()) == float(y.detach().abs().max())
    y.sum().backward()
    assert gate.grad.shape == gate.shape


def test_hopper_moves_sixteen_bytes_without_spilling():
    from kernels.triton.swiglu import BLOCK, WARPS

    pointers = ["grad", "gate", "up", "grad_gate", "grad_up"]
    signature = {
        **dict.fromkeys(pointers, "*bf16"),
        "amax": "*i32",
        "n": "i32",
        "WITH_AMAX": "constexpr",
        "BLOCK": "constexpr",
    }
    found = compile_for_hopper(
        "kernels.triton.swiglu:backward_kernel",
        signature,
        {"WITH_AMAX": True, "BLOCK": BLOCK},
        num_warps=WARPS,
        aligned=(*pointers, "amax", "n"),
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64
    moves = {access for access in found["accesses"] if not access.startswith("atom")}
    assert moves == {"ld.global.v4.b32", "st.global.v4.b32"}
