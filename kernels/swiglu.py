"""SwiGLU's product and its backward, each in one pass.

    y = silu(gate) * up                  silu(g) = g s(g),  s the logistic function
    dgate = dy up s (1 + gate (1 - s))   dup = dy gate s

(Shazeer 2020, arXiv 2002.05202.) Kept for backward: gate and up, nothing else. Arithmetic is fp32 and each
result is rounded once, where eager PyTorch rounds silu(gate) as well and keeps it.

Both can give the largest magnitude of what they wrote, after rounding, which a float8 cast with one dynamic
scale would otherwise read all of it again to find. NaN counts as the largest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators import operator
from kernels.support import runs_triton


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    return _forward(gate, up, False)[0]


def silu_mul_with_amax(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up and its amax, (1,) fp32, through which no gradient flows."""
    return _forward(gate, up, True)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The product in plain PyTorch."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def silu_mul_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) in plain PyTorch."""
    d, g, u = grad.float(), gate.float(), up.float()
    s = g.sigmoid()
    return (d * u * s * (1.0 + g * (1.0 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


@operator("silu_mul")
def _forward(gate: Tensor, up: Tensor, with_amax: bool) -> tuple[Tensor, Tensor]:
    assert gate.shape == up.shape, (gate.shape, up.shape)
    assert gate.dtype == up.dtype, (gate.dtype, up.dtype)
    amax = gate.new_zeros(int(with_amax), dtype=torch.float32)
    if not runs_triton(gate.device):
        y = silu_mul_reference(gate, up)
        return y, _amaxes(amax, y)
    from kernels.triton.swiglu import launch_forward

    return launch_forward(gate.contiguous(), up.contiguous(), amax if with_amax else None), amax


@_forward.register_fake
def _(gate: Tensor, up: Tensor, with_amax: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return y, gate.new_empty(int(with_amax), dtype=torch.float32)


@operator("silu_mul_backward")
def silu_mul_backward(
    grad: Tensor, gate: Tensor, up: Tensor, with_amax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, their amaxes): (2,) fp32, empty unless `with_amax`."""
    amaxes = gate.new_zeros(2 * with_amax, dtype=torch.float32)
    if not runs_triton(gate.device):
        grads = silu_mul_backward_reference(grad, gate, up)
        return *grads, _amaxes(amaxes, *grads)
    from kernels.triton.swiglu import launch_backward

    inputs = (grad.contiguous(), gate.contiguous(), up.contiguous())
    return *launch_backward(*inputs, amaxes if with_amax else None), amaxes


@silu_mul_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, with_amax: bool) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up)]
    return like[0], like[1], gate.new_empty(2 * with_amax, dtype=torch.float32)


def _amaxes(out: Tensor, *tensors: Tensor) -> Tensor:
    for amax, tensor in zip(out, tensors, strict=False):  # an empty `out` asks for none
        if tensor.numel():
            amax.copy_(tensor.abs().amax())
    return out


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    gate, up, _ = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor, amax_grad: Tensor | None) -> tuple[Tensor, Tensor, None]:
    grad_gate, grad_up, _ = silu_mul_backward(grad, *ctx.saved_tensors, False)
    return grad_gate, grad_up, None


_forward.register_autograd(_backward, setup_context=_keep)
