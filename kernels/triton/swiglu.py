"""silu(gate) * up and its backward, each in one pass, with the largest magnitude of what is written.

Bytes an element in bf16: forward 4 read, 2 written; backward 6 read, 4 written. The amax of the results costs
no further pass: a program takes that of its block and raises the common one (`kernels.triton.magnitude`).
Measured on an H100, (8192, 14336): 0.227 ms forward and 0.387 backward, 3.1 and 3.0 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.magnitude import raise_amax

BLOCK = 4096
WARPS = 8


@triton.jit
def forward_kernel(gate, up, out, amax, n, WITH_AMAX: tl.constexpr, BLOCK: tl.constexpr):
    """Write silu(gate) * up of n elements; amax[0] is that of `out` as it is stored."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    y = (g * tl.sigmoid(g) * u).to(out.dtype.element_ty)
    tl.store(out + place, y, mask=inside)
    if WITH_AMAX:
        raise_amax(amax, y)


@triton.jit
def backward_kernel(
    grad, gate, up, grad_gate, grad_up, amax, n, WITH_AMAX: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the gradients of gate and up, n elements; amax[0] and amax[1] are theirs."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    dg = (d * u * s * (1.0 + g * (1.0 - s))).to(grad_gate.dtype.element_ty)
    du = (d * g * s).to(grad_up.dtype.element_ty)
    tl.store(grad_gate + place, dg, mask=inside)
    tl.store(grad_up + place, du, mask=inside)
    if WITH_AMAX:
        raise_amax(amax, dg)
        raise_amax(amax + 1, du)


def launch_forward(gate: Tensor, up: Tensor, amax: Tensor | None) -> Tensor:
    """`amax` is (1,) fp32 zeros, or None; inputs are contiguous and alike."""
    out = torch.empty_like(gate)
    if n := gate.numel():
        bits = gate if amax is None else amax.view(torch.int32)
        forward_kernel[(triton.cdiv(n, BLOCK),)](
            gate, up, out, bits, n, WITH_AMAX=amax is not None, BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def launch_backward(grad: Tensor, gate: Tensor, up: Tensor, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """`amax` is (2,) fp32 zeros, or None; inputs are contiguous and alike."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if n := gate.numel():
        bits = gate if amax is None else amax.view(torch.int32)
        backward_kernel[(triton.cdiv(n, BLOCK),)](
            grad,
            gate,
            up,
            grad_gate,
            grad_up,
            bits,
            n,
            WITH_AMAX=amax is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return grad_gate, grad_up
