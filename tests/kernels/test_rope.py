"""Rotary kernel: reference against autograd, Triton (interpreted) against the reference, amax, ptxas."""

import math

import pytest
import torch

from kernels.rope import rotate, rotate_pairs
from tests.kernels.hopper import compile_for_hopper

SHAPES = [
    (1, 1, 1, 2),
    (2, 5, 3, 24),
    (1, 40, 8, 16),  # more positions than a program takes
    (2, 3, 70, 96),  # heads for two programs
    (3, 37, 1, 128),
    (1, 2, 3, 512),  # rows of the tables are longer than a program has threads
    (1, 1, 1, 8192),  # a head is more than a program takes
]


def tables(rows, head_dim):
    angles = torch.outer(torch.arange(rows).float() + 1, torch.rand(head_dim // 2) * 3)
    return angles.cos(), angles.sin()


def inputs(B, S, H, Dh, dtype=torch.float32, more_rows=0):
    torch.manual_seed(B + S + H + Dh)
    return torch.randn(B, S, H, Dh).to(dtype), *tables(S + more_rows, Dh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inverse", [False, True])
def test_value_and_gradient_are_autograds_to_the_bit(dtype, inverse):
    x, cos, sin = inputs(2, 5, 3, 8, dtype, more_rows=2)
    plain, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = rotate(plain, cos[:5, None], (-sin if inverse else sin)[:5, None])
    got, _ = rotate_pairs(own, cos, sin, inverse, False)
    for y in (want, got):
        y.square().sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(own.grad, plain.grad)


def test_the_other_way_is_back():
    x, cos, sin = inputs(2, 7, 3, 10)
    turned, _ = rotate_pairs(x, cos, sin, False, False)
    assert (turned - x).abs().max() > 1
    torch.testing.assert_close(rotate_pairs(turned, cos, sin, True, False)[0], x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates to bf16
@pytest.mark.parametrize("inverse", [False, True])
def test_the_kernel_is_the_reference_to_the_bit(shape, dtype, inverse):
    from kernels.triton.rope import launch

    x, cos, sin = inputs(*shape, dtype, more_rows=shape[1] % 3)
    want, given = rotate_pairs(x, cos, sin, inverse, True)
    amax = torch.zeros(1)
    y = launch(x, cos, sin, inverse, amax)
    assert torch.equal(y, want)
    assert amax.tolist() == given.tolist() == [float(y.abs().max())]
    assert torch.equal(launch(x, cos, sin, inverse, None), y)


STRIDED = {
    "heads first": lambda B, S, H, Dh: torch.randn(B, H, S, Dh).transpose(1, 2),
    "a slice": lambda B, S, H, Dh: torch.randn(B, S + 2, H + 1, 2 * Dh)[:, 1:-1, 1:, Dh - 3 : -3],
    "one for all heads": lambda B, S, H, Dh: torch.randn(B, S, 1, Dh).expand(-1, -1, H, -1),
    "one for all positions": lambda B, S, H, Dh: torch.randn(1, 1, H, Dh).expand(B, S, -1, -1),
}


@pytest.mark.parametrize("name", STRIDED)
def test_the_kernel_reads_where_heads_lie(name):
    from kernels.triton.rope import launch

    x = STRIDED[name](2, 9, 5, 12)
    assert not x.is_contiguous()
    assert x.stride(3) == 1
    cos, sin = tables(9, 12)
    y = launch(x, cos, sin, False, None)
    assert y.is_contiguous()
    assert torch.equal(y, rotate_pairs(x, cos, sin, False, False)[0])


def test_a_gradient_whose_elements_lie_apart():
    x, cos, sin = inputs(2, 4, 3, 6)
    for own in (x.requires_grad_(), x.detach().mT.contiguous().mT.requires_grad_()):
        y, amax = rotate_pairs(own, cos, sin, False, True)
        assert y.is_contiguous()
        y.sum().backward()  # one number, seen everywhere
        want = rotate(torch.ones_like(x), cos[:, None], -sin[:, None]).detach()
        assert torch.equal(own.grad, want)
        assert float(amax.detach()) == float(y.detach().abs().max())


def test_amax_knows_infinity_and_nan():
    from kernels.triton.rope import launch

    x, cos, sin = inputs(1, 300, 4, 16)
    amax = torch.zeros(1)
    x[0, 299, 3, 15] = math.inf
    cos[299], sin[299] = 0.5, 0.5
    launch(x, cos, sin, False, amax)
    assert float(amax) == math.inf
    x[0, 1, 0, 0] = math.nan  # in another program
    launch(x, cos, sin, False, amax)
    assert math.isnan(float(amax))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_nothing_in_nothing_out(shape):
    from kernels.triton.rope import launch

    x, cos, sin = inputs(*shape)
    assert launch(x, cos, sin, False, torch.zeros(1)).shape == shape
    y, amax = rotate_pairs(x, cos, sin, False, True)
    assert y.shape == shape
    assert amax.tolist() == [0.0]


def test_tables_that_do_not_fit_are_refused():
    x, cos, sin = inputs(1, 4, 2, 8)
    for wrong in ((cos[:3], sin[:3]), (cos[:, :3], sin[:, :3]), (cos, sin[:3]), (cos.bfloat16(), sin)):
        with pytest.raises(AssertionError):
            rotate_pairs(x, *wrong, False, False)


@pytest.mark.parametrize("with_amax", [False, True])
def test_the_operator_composes_with_the_compiler(with_amax):
    x, cos, sin = inputs(2, 4, 3, 8, more_rows=1)
    for own in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        own = own.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.library.opcheck(rotate_pairs.overload, (own, cos, sin, False, with_amax))


@pytest.mark.parametrize(("heads", "with_amax"), [(32, True), (8, False)])
def test_hopper_moves_sixteen_bytes_and_shares_nothing(heads, with_amax):
    """Queries of Llama3-8B in backward, and its keys in forward."""
    from kernels.triton.rope import WARPS, tile

    pointers = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*bf16", "amax": "*i32"}
    strides = ["batch_stride", "position_stride", "head_stride"]
    sizes = ["S", "H", *strides, "position_tiles"]
    constants = {"DH": 128, "INVERSE": with_amax, "WITH_AMAX": with_amax, **tile(8192, heads, 128)}
    constants["head_tiles"] = 1  # as a launch makes of every size that is
    found = compile_for_hopper(
        "kernels.triton.rope:rotate_kernel",
        {
            **pointers,
            **dict.fromkeys(sizes, "i32"),
            **dict.fromkeys(["head_tiles", *list(constants)[:-1]], "constexpr"),
        },
        constants,
        num_warps=WARPS,
        aligned=(*pointers, "S", *strides),
        fp_fusion=False,
    )
    assert found["stack"] == 0
    assert found["registers"] <= 64
    assert found["shared"] == 4 * WARPS * with_amax  # an amax of each warp
    moves = {access for access in found["accesses"] if not access.startswith("atom")}
    assert moves == {"ld.global.v4.b32", "st.global.v4.b32"}
