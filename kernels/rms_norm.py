"""RMSNorm, by itself or together with the addition to the residual stream before it.

    h = x (+ r)        rstd = (mean h^2 + eps)^-1/2        y = h rstd w
    n = h rstd         dh = rstd (dy w - n mean(dy w n)) (+ dh from elsewhere)     dw = sum over rows of dy n

(Zhang and Sennrich 2019, arXiv 1910.07467.) h is rounded to the stream's dtype before it is normed, as it is
when it is added separately; all else is fp32 and rounded once. dx = dr = dh: addition hands its gradient to
both.

Kept for backward: h and rstd (4 bytes a row). A block then reads and writes the stream once where it adds and
norms, and in backward the gradients of both branches meet in one kernel; those of y from up to three readers
too, where a compiler is told so (`parallelisms.addition_pass`): 6 bytes an element less for each.

Both can give the largest magnitude of y, or of dh, after rounding, which a float8 cast with one dynamic scale
would otherwise read all of it again to find. NaN counts as the largest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.operators import operator
from kernels.support import runs_triton

MOST_GRADS = 3
"""That are added up to y's: its readers in a block are wq, wk and wv, or w1 and w3."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm of (..., D) along D, times the (D,) weight."""
    return _forward(x, None, weight, eps, False)[1]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, its norm), both (..., D)."""
    h, y, _, _ = _forward(x, residual, weight, eps, False)
    return h, y


def rms_norm_with_amax(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm and its amax, (1,) fp32, through which no gradient flows."""
    _, y, _, amax = _forward(x, None, weight, eps, True)
    return y, amax


def rms_norm_reference(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd) of (..., D), in plain PyTorch; rstd is (...,) fp32."""
    value = h.float()
    rstd = (value.square().mean(-1) + eps).rsqrt()
    return (value * rstd[..., None] * weight.float()).to(h.dtype), rstd


def rms_norm_backward_reference(
    grads: list[Tensor], h: Tensor, weight: Tensor, rstd: Tensor, stream_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dh, dw) in plain PyTorch."""
    dy, normed = torch.stack([grad.float() for grad in grads]).sum(0), h.float() * rstd[..., None]
    weighted = dy * weight.float()
    dh = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd[..., None]
    if stream_grad is not None:
        dh = dh + stream_grad.float()
    return dh.to(h.dtype), (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)


@operator("rms_norm")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, with_amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + residual, or an empty tensor where there is none; y; rstd; amax, empty unless wanted)."""
    amax = x.new_zeros(int(with_amax), dtype=torch.float32)
    if not runs_triton(x.device):
        h = x if residual is None else x + residual
        y, rstd = rms_norm_reference(h, weight, eps)
        return x.new_empty(0) if residual is None else h, y, rstd, _fill(amax, y)
    from kernels.triton.rms_norm import launch_forward

    D = x.shape[-1]
    rows = x.reshape(-1, D).contiguous()
    added = None if residual is None else residual.reshape(-1, D).contiguous()
    h, y, rstd = launch_forward(rows, added, weight.contiguous(), eps, amax if with_amax else None)
    return (
        x.new_empty(0) if h is None else h.view(x.shape),
        y.view(x.shape),
        rstd.view(x.shape[:-1]),
        amax,
    )


@_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, with_amax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (
        x.new_empty(0) if residual is None else torch.empty_like(y),
        y,
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(int(with_amax), dtype=torch.float32),
    )


@operator("rms_norm_backward")
def rms_norm_backward(
    grads: list[Tensor], h: Tensor, weight: Tensor, rstd: Tensor, stream_grad: Tensor | None, with_amax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dw, dh's amax, empty unless wanted).

    `grads`, one to three, are added to y's gradient in fp32; they and `stream_grad`, which is what arrives at
    h from elsewhere, have h's elements in h's order.
    """
    amax = h.new_zeros(int(with_amax), dtype=torch.float32)
    if not runs_triton(h.device):
        dh, dw = rms_norm_backward_reference(
            [grad.reshape(h.shape) for grad in grads],
            h,
            weight,
            rstd,
            None if stream_grad is None else stream_grad.reshape(h.shape),
        )
        return dh, dw, _fill(amax, dh)
    from kernels.triton.rms_norm import launch_backward

    D = h.shape[-1]
    dys, rows = [grad.reshape(-1, D).contiguous() for grad in grads], h.reshape(-1, D).contiguous()
    stream = None if stream_grad is None else stream_grad.reshape(-1, D).contiguous()
    inputs = (dys, rows, weight.contiguous(), rstd.reshape(-1).contiguous(), stream)
    dh, dw = launch_backward(*inputs, amax if with_amax else None)
    return dh.view(h.shape), dw, amax


@rms_norm_backward.register_fake
def _(
    grads: list[Tensor], h: Tensor, weight: Tensor, rstd: Tensor, stream_grad: Tensor | None, with_amax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dh, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, weight))
    return dh, dw, h.new_empty(int(with_amax), dtype=torch.float32)


def _fill(amax: Tensor, t: Tensor) -> Tensor:
    """Write that of t, where there is a place for it and a t."""
    return amax.copy_(t.abs().amax()) if amax.numel() and t.numel() else amax


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, _ = inputs
    h, _, rstd, _ = output
    ctx.added = residual is not None
    ctx.save_for_backward(h if ctx.added else x, weight, rstd)


def _backward(
    ctx: Any, h_grad: Tensor | None, grad: Tensor, rstd_grad: Tensor | None, amax_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    dh, dw, _ = rms_norm_backward([grad], *ctx.saved_tensors, h_grad if ctx.added else None, False)
    return dh, dh if ctx.added else None, dw, None, None


_forward.register_autograd(_backward, setup_context=_keep)
