"""The Triton form of `kernels.adamw`: one launch for any number of tensors.

The table (`kernels.triton.tensor_table`) holds, for each tensor, the addresses of its parts beside its size
and the number of its first block.

A full block of a tensor whose parts all lie on 16-byte boundaries moves 16 bytes a thread and access; where
only some of the parts are bf16, their 8 bytes go with the others' 16. What is left over, the end of a tensor
or a gradient that begins elsewhere, goes element by element. A thread has one such access of each part: few
registers, many threads, and no elements that change hands between layouts.

Products and sums are fused where `tl.fma` says so and nowhere else, and divisions and roots are those of
IEEE 754: the result has the bits of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.magnitude import raise_amax
from kernels.triton.tensor_table import ACCESS, WARPS, bisections, block_size, build_table, find_tensor

NO_DECAY, DECOUPLED, L2 = 0, 1, 2


@triton.jit(do_not_specialize=["tensors"])
def adamw_kernel(
    table,  # (9, P) int64: first block, size, is aligned, addresses of param, grad, m, v, copy, amax
    step_sizes,  # (P,) fp32
    roots,  # (P,) fp32
    grad_scale,  # () fp32, or None
    found_inf,  # () fp32, or None
    tensors,  # P
    decay,  # 1 - lr wd, or wd for L2
    lerp_weight,  # 1 - beta1
    beta2,
    square_weight,  # 1 - beta2
    eps,
    BISECTIONS: tl.constexpr,
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    STATE_BF16: tl.constexpr,
    DECAY: tl.constexpr,  # 0 none, 1 decoupled, 2 L2
    NEAR_GRAD: tl.constexpr,  # 1 - beta1 is 1/2 or more
    COPIES: tl.constexpr,
    AMAXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block `program_id` of all tensors' blocks in a row."""
    block = tl.program_id(0)
    place = find_tensor(table, tensors, block, BISECTIONS)
    row = table + place
    start = (block - tl.load(row)) * BLOCK
    size = tl.load(row + tensors)
    is_aligned = tl.load(row + 2 * tensors)
    param = tl.load(row + 3 * tensors).to(tl.pointer_type(tl.bfloat16 if PARAM_BF16 else tl.float32))
    grad = tl.load(row + 4 * tensors).to(tl.pointer_type(tl.bfloat16 if GRAD_BF16 else tl.float32))
    exp_avg = tl.load(row + 5 * tensors).to(tl.pointer_type(tl.bfloat16 if STATE_BF16 else tl.float32))
    exp_avg_sq = tl.load(row + 6 * tensors).to(tl.pointer_type(tl.bfloat16 if STATE_BF16 else tl.float32))
    copy = tl.load(row + 7 * tensors).to(tl.pointer_type(tl.bfloat16))
    amax = tl.load(row + 8 * tensors).to(tl.pointer_type(tl.int32))
    step_size = tl.load(step_sizes + place)
    root = tl.load(roots + place)
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    if found_inf is not None:
        size = tl.where(tl.load(found_inf) == 1.0, 0, size)

    offsets = start + tl.arange(0, BLOCK)
    if (is_aligned != 0) & (start + BLOCK <= size):
        _update(
            tl.multiple_of(param, 16),
            tl.multiple_of(grad, 16),
            tl.multiple_of(exp_avg, 16),
            tl.multiple_of(exp_avg_sq, 16),
            tl.multiple_of(copy, 16),
            amax, offsets, None, scale, step_size, root, decay, lerp_weight, beta2, square_weight, eps,
            DECAY, NEAR_GRAD, COPIES, AMAXES,
        )  # fmt: skip
    else:
        _update(
            param, grad, exp_avg, exp_avg_sq, copy,
            amax, offsets, offsets < size, scale, step_size, root, decay, lerp_weight, beta2, square_weight,
            eps, DECAY, NEAR_GRAD, COPIES, AMAXES,
        )  # fmt: skip


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, copy, amax, offsets, mask,
    scale, step_size, root, decay, lerp_weight, beta2, square_weight, eps,
    DECAY: tl.constexpr, NEAR_GRAD: tl.constexpr, COPIES: tl.constexpr, AMAXES: tl.constexpr,
):  # fmt: skip
    """The step of the elements at `offsets`."""
    g = tl.load(grad + offsets, mask=mask).to(tl.float32) * scale
    p = tl.load(param + offsets, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + offsets, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + offsets, mask=mask).to(tl.float32)
    if DECAY == 1:
        p = p * decay
    if DECAY == 2:
        g = tl.fma(p, decay, g)
    if NEAR_GRAD:  # from the nearer end, as torch's lerp
        m = tl.fma(lerp_weight - 1.0, g - m, g)
    else:
        m = tl.fma(lerp_weight, g - m, m)
    v = tl.fma(g * square_weight, g, v * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
    p = p - tl.div_rn(m * step_size, denominator)
    new = p.to(param.dtype.element_ty)
    tl.store(param + offsets, new, mask=mask)
    tl.store(exp_avg + offsets, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + offsets, v.to(exp_avg_sq.dtype.element_ty), mask=mask)
    if COPIES:
        tl.store(copy + offsets, p.to(tl.bfloat16), mask=mask)
    if AMAXES:
        if mask is not None:
            new = tl.where(mask, new, 0.0)
        raise_amax(amax, new)


def launch(
    parts: tuple[list[Tensor], ...],
    step_sizes: Tensor,
    roots: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Update all tensors; arguments as `kernels.adamw.adamw_step` has checked them.

    Args:
        parts: params, grads, exp_avgs, exp_avg_sqs, copies, amaxes: P each; the last two may be empty.
        step_sizes: lr / (1 - beta1^t), (P,) fp32.
        roots: sqrt(1 - beta2^t), (P,) fp32.
        grad_scale: () fp32 on the device, or None.
        found_inf: () fp32 on the device, or None.
        lr: Learning rate.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the denominator.
        weight_decay: wd.
        decoupled: AdamW's decay rather than Adam's.
    """
    params, grads, exp_avgs, _, copies, amaxes = parts
    block = block_size(part[0].element_size() for part in parts[:4])
    table, blocks = _table(parts, block)
    _restart(amaxes, found_inf)
    if blocks == 0:
        return
    mode = NO_DECAY
    if weight_decay:
        mode = DECOUPLED if decoupled else L2
    adamw_kernel[(blocks,)](
        table,
        step_sizes,
        roots,
        grad_scale,
        found_inf,
        len(params),
        1 - lr * weight_decay if mode == DECOUPLED else weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        BISECTIONS=bisections(len(params)),
        PARAM_BF16=params[0].dtype == torch.bfloat16,
        GRAD_BF16=grads[0].dtype == torch.bfloat16,
        STATE_BF16=exp_avgs[0].dtype == torch.bfloat16,
        DECAY=mode,
        NEAR_GRAD=1 - beta1 >= 0.5,
        COPIES=bool(copies),
        AMAXES=bool(amaxes),
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _table(parts: tuple[list[Tensor], ...], block: int) -> tuple[Tensor, int]:
    """The kernel's table on the device, and the number of all blocks."""
    params = parts[0]
    addresses = [[t.data_ptr() for t in part] or [0] * len(params) for part in parts]
    widest = addresses[:-1]  # amaxes are scalars
    aligned = [int(not any(a % ACCESS for a in own)) for own in zip(*widest, strict=True)]
    return build_table([p.numel() for p in params], [aligned, *addresses], block, params[0].device)


def _restart(amaxes: list[Tensor], found_inf: Tensor | None) -> None:
    """Let maxima begin at 0, but keep them where nothing is updated."""
    if amaxes and found_inf is None:
        torch._foreach_zero_(amaxes)
    elif amaxes:
        kept = torch.where(found_inf == 1, torch.stack(amaxes), 0.0)
        torch._foreach_copy_(amaxes, list(kept.unbind()))
