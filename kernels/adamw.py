"""One step of Adam or AdamW in one pass: clipping, moments, update, and what the next step reads.

With g the gradient times `grad_scale` (the clip factor), t the step, everything in fp32::

    AdamW   p <- p (1 - lr wd)          Adam   g <- g + wd p
    m <- m + (1 - beta1) (g - m)
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101. The operations, their order
and their roundings (products that are added are fused) are those of torch's fused optimizer on a CPU, whose
bits this reproduces in fp32 and bf16 for beta1 > 1/2, but for the last elements of a tensor, where torch's
kernel leaves its vectors for another arithmetic. The Triton form has the reference's bits. torch's fused
optimizer on a GPU takes 1 - beta from betas rounded to fp32: it differs by about 1e-7 of (1 - beta2).

Bytes of an fp32 parameter with an fp32 gradient: p, m, v read and written, g read, 28. Clipping costs
nothing; by itself it reads and writes the gradient once more, 8. A bf16 copy of the new parameter costs 2
where a cast of its own costs 6; its largest magnitude costs nothing where a pass of its own costs 4.

Measured on an H100 with bf16 gradients and copies, 28 bytes: 2.8e9 parameters in 26.2 ms, 2.98 TB/s, where
copying memory reaches 3.02.

The verdict on a bad step (`found_inf`), the clip factor and the step counts stay on the device, and the host
does not wait for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.support import runs_triton

_DTYPES = (torch.float32, torch.bfloat16)
_CHUNK = 2**14
_VECTOR = 64
"""Elements that fill whole vectors on every CPU: torch fuses products and sums in those alone."""


@torch.library.custom_op(
    "octavo::adamw_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "amaxes")
)
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    amaxes: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Update parameters and moments in place; the i-th of each list belong together.

    Args:
        params: Contiguous, of one device; within each list all have one dtype, fp32 or bf16. Empty ones may
            be among them.
        grads: As many elements each.
        exp_avgs: m, as many elements each.
        exp_avg_sqs: v, of m's dtype.
        steps: t, the number of this step counted from 1: () fp32 each.
        copies: Filled with the new parameters in bf16; or an empty list.
        amaxes: Filled with the largest magnitudes of the new parameters, () fp32 each; or an empty list.
        grad_scale: Factor of all gradients, () fp32; None for 1.
        found_inf: Where it is 1, () fp32, nothing is changed.
        lr: Learning rate.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the denominator.
        weight_decay: wd above.
        decoupled: AdamW's decay rather than Adam's.

    Raises:
        ValueError: a dtype, a size or a layout is another.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, steps, copies, amaxes)
    if not params:
        return
    step_sizes, roots = _bias_corrections(steps, lr, beta1, beta2)
    device = params[0].device
    if not runs_triton(device):
        if found_inf is not None and found_inf == 1:
            return
        for index, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
            adamw_reference(
                *tensors,
                copies[index] if copies else None,
                amaxes[index] if amaxes else None,
                step_sizes[index],
                roots[index],
                grad_scale,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                decoupled=decoupled,
            )
        return
    from kernels.triton.adamw import launch

    launch(
        (params, grads, exp_avgs, exp_avg_sqs, copies, amaxes),
        step_sizes,
        roots,
        grad_scale,
        found_inf,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
    )


@adamw_step.register_fake
def _(*_: object) -> None:
    return None


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    amax: Tensor | None,
    step_size: Tensor,
    root: Tensor,
    grad_scale: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """The step of one tensor; `step_size` is lr / (1 - beta1^t) and `root` sqrt(1 - beta2^t), () fp32."""
    tensors = [param, grad, exp_avg, exp_avg_sq, *([] if copy is None else [copy])]
    for p, g, m, v, *low in zip(*(t.view(-1).split(_CHUNK) for t in tensors), strict=True):
        count = p.numel()
        p32, g32, m32, v32 = (F.pad(t.float(), (0, -count % _VECTOR)) for t in (p, g, m, v))
        if grad_scale is not None:
            g32 = g32 * grad_scale
        if weight_decay and decoupled:
            p32 = p32 * (1 - lr * weight_decay)
        elif weight_decay:
            g32 = torch.add(g32, p32, alpha=weight_decay)
        m32 = torch.lerp(m32, g32, 1 - beta1)
        v32 = torch.addcmul(v32 * beta2, g32, g32, value=1 - beta2)
        v_root = v32.double().sqrt().float()  # MKL's fp32 root, which torch takes, is not always the nearest
        p32 = p32 - step_size * m32 / (v_root / root + eps)
        for target, new in [(p, p32), (m, m32), (v, v32), *((t, p32) for t in low)]:
            target.copy_(new[:count])
    if amax is not None:
        amax.copy_(param.abs().amax() if param.numel() else torch.zeros(()))


def _bias_corrections(steps: list[Tensor], lr: float, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Step size lr / (1 - beta1^t) and root sqrt(1 - beta2^t), (P,) fp32 each.

    In fp64, as torch has them: 1 - beta^t loses what fp32 has of beta in the first steps.
    """
    t = torch.stack(steps).double()
    step_sizes = torch.full_like(t, lr) / (1 - beta1**t)
    return step_sizes.float(), (1 - beta2**t).sqrt().float()


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    amaxes: list[Tensor],
) -> None:
    """Raise ValueError for what a kernel that is given addresses would not notice."""
    count, sizes = len(params), [p.numel() for p in params]
    named = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "copies": copies,
    }
    for name, tensors in named.items():
        if not tensors and name == "copies":
            continue
        if [t.numel() for t in tensors] != sizes:
            raise ValueError(f"adamw_step: {name} are not of the sizes of params")
        dtypes, devices = {t.dtype for t in tensors}, {t.device for t in tensors}
        if len(dtypes | devices) > 2 or devices - {p.device for p in params[:1]}:
            raise ValueError(f"adamw_step: {name} are of several dtypes or devices: {dtypes}, {devices}")
        allowed = (torch.bfloat16,) if name == "copies" else _DTYPES
        if dtypes - set(allowed):
            raise ValueError(f"adamw_step: {name} are {dtypes.pop()}; allowed: {allowed}")
        if not all(t.is_contiguous() for t in tensors):
            raise ValueError(f"adamw_step: one of {name} is not contiguous")
    if {t.dtype for t in exp_avgs} != {t.dtype for t in exp_avg_sqs}:
        raise ValueError("adamw_step: exp_avgs and exp_avg_sqs are of different dtypes")
    if len(steps) != count or len(amaxes) not in (0, count):
        raise ValueError(f"adamw_step: {count} params, {len(steps)} steps, {len(amaxes)} amaxes")
    if any(a.dtype != torch.float32 or a.numel() != 1 for a in amaxes):
        raise ValueError("adamw_step: amaxes are not fp32 scalars")
