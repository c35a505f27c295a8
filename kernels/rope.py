"""Rotary position embedding of interleaved pairs, forward and backward in one pass each.

    y[2i]   = x[2i] cos - x[2i+1] sin            cos and sin of position and pair, shared by the heads
    y[2i+1] = x[2i] sin + x[2i+1] cos

(Su et al. 2021, arXiv 2104.09864, section 3.4.2; `models.rope` makes the tables.) A rotation's gradient is
the rotation the other way, with -sin for sin: one operator does both. Kept for backward: the tables, which
the model has anyway. Arithmetic is fp32, every product and sum rounded there, and the result rounded once.

It can give the largest magnitude of y, after rounding, which a float8 cast with one dynamic scale would
otherwise read all of it again to find. NaN counts as the largest.

Legend: B sequences, S positions, H heads, Dh head width, R >= S rows of the tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.operators import operator
from kernels.support import runs_triton


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference: turn the pairs of (B, S, H, Dh), with tables that broadcast to (B, S, H, Dh/2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


@operator("rotate_pairs")
def rotate_pairs(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, with_amax: bool
) -> tuple[Tensor, Tensor]:
    """Turn x (B, S, H, Dh), of any strides, by the first S rows of (R, Dh/2) fp32 tables.

    No gradient flows to the tables, nor through the amax.

    Returns:
        y, like x and contiguous, turned the other way if `inverse`; its amax, (1,) fp32, empty unless
        `with_amax`.
    """
    S, Dh = x.shape[1], x.shape[3]
    assert cos.shape == sin.shape, (cos.shape, sin.shape)
    assert cos.shape[0] >= S, (cos.shape, x.shape)
    assert 2 * cos.shape[1] == Dh, (cos.shape, x.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    amax = x.new_zeros(int(with_amax), dtype=torch.float32)
    if runs_triton(x.device):
        from kernels.triton.rope import launch

        rows = x if x.stride(3) == 1 else x.contiguous()
        return launch(rows, cos.contiguous(), sin.contiguous(), inverse, amax if with_amax else None), amax
    y = rotate(x, cos[:S, None], -sin[:S, None] if inverse else sin[:S, None])
    if with_amax and y.numel():
        amax.copy_(y.abs().amax())
    return y, amax


@rotate_pairs.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, with_amax: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(int(with_amax), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cos, sin, inverse, _ = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx: Any, grad: Tensor, amax_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x, _ = rotate_pairs(grad, *ctx.saved_tensors, not ctx.inverse, False)
    return grad_x, None, None, None, None


rotate_pairs.register_autograd(_backward, setup_context=_keep)
