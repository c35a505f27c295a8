"""Cross-entropy, summed, so that the caller normalises it by the tokens of the whole step.

A step's loss is the sum over all valid tokens of all ranks and micro-batches, over their number::

    loss = sum_{r, a, t} CE(logits, label) / sum_{r, a} count(label != IGNORED_LABEL)

Every micro-batch is divided by that global count and gradients are *added* over micro-batches and ranks
(the data-parallel divide factor is 1), so the result does not depend on the layout, also where ranks hold
different numbers of ignored labels.

Under tensor parallelism the logits may come as shards of the vocabulary (a DTensor). Then each rank keeps its
shard, and only three numbers per token travel: with shards r of one token's logits z,

    m = max_r max z_r        t = sum_r sum exp(z_r - m)        CE = log t + m - z[label]

The fused form (`kernels.cross_entropy`) is the same sum for both, in two kernels, and writes the gradient
over the logits: they are used up by backward. How the logits are made piece by piece is in
`trainer.chunked_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from kernels.cross_entropy import cross_entropy, cross_entropy_gradient_
from parallelisms.config import CompileConfig
from trainer.config.sections import TrainingConfig
from trainer.data.packing import IGNORED_LABEL

LossFn = Callable[[Tensor, Tensor], Tensor]


def build_loss(training: TrainingConfig, compile_config: CompileConfig) -> LossFn:
    """(logits, labels) -> sum of cross-entropies, by the kernels that the settings ask for."""
    if training.loss_kernel == "fused":
        return fused_cross_entropy_sum
    if compile_config.enable and "loss" in compile_config.components:
        return torch.compile(cross_entropy_sum, backend=compile_config.backend)
    return cross_entropy_sum


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all valid positions, in fp32.

    Args:
        logits: (B, S, V), any float dtype; raised to fp32 here. A DTensor sharded along V gives the same sum.
        labels: (B, S) int64; IGNORED_LABEL positions count nothing.
    """
    if isinstance(logits, DTensor):
        return _sharded_cross_entropy_sum(logits, labels)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )


def fused_cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The same sum as `cross_entropy_sum`; backward overwrites `logits`, and so can run once only."""
    if isinstance(logits, DTensor):
        local, first, group = _own_shard(logits)
        return _FusedCrossEntropy.apply(local, labels.flatten(), first, group)
    return _FusedCrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), 0, None)


def _sharded_cross_entropy_sum(logits: DTensor, labels: Tensor) -> Tensor:
    local, first, group = _own_shard(logits)
    return _ShardedCrossEntropy.apply(local, labels.flatten(), first, group)


def _own_shard(logits: DTensor) -> tuple[Tensor, int, str]:
    """This rank's (T, V/tp) logits, the number of their first column, and the group that has the others."""
    mesh = logits.device_mesh
    assert logits.placements == (Shard(logits.dim() - 1),), logits.placements
    first = mesh.get_local_rank() * (logits.shape[-1] // mesh.size())
    return logits.to_local().flatten(0, 1), first, mesh.get_group().group_name


class _ShardedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies from this rank's (T, V/tp) logits; the same on every rank of the group."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: str) -> Tensor:
        z, index = logits.float(), labels - first
        mine = (index >= 0) & (index < z.shape[1])  # IGNORED_LABEL is negative, so nobody's
        index = torch.where(mine, index, 0)
        top = _all_reduce(z.amax(-1), "max", group)
        exp_sum = (z - top[:, None]).exp().sum(-1)
        at_label = torch.where(mine, z.gather(-1, index[:, None]).squeeze(-1), 0.0)
        exp_sum, at_label = _all_reduce(torch.stack([exp_sum, at_label]), "sum", group).unbind()
        log_sum = exp_sum.log() + top
        valid = labels != IGNORED_LABEL
        ctx.save_for_backward(logits, log_sum, index, mine, valid)
        return torch.where(valid, log_sum - at_label, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Softmax(z) - onehot(label)."""
        logits, log_sum, index, mine, valid = ctx.saved_tensors
        probability = (logits.float() - log_sum[:, None]).exp()
        at_label = probability.scatter_add(-1, index[:, None], -mine.float()[:, None])
        scale = torch.where(valid, grads[0], 0.0)[:, None]
        return (at_label * scale).to(logits.dtype), None, None, None


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies from (T, V) logits, whole or one rank's shard; see `kernels.cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: str | None) -> Tensor:
        logits = logits.contiguous()
        index = labels - first  # an ignored label stays negative, so nobody's
        log_sum, at_label = cross_entropy(logits, index)
        if group is not None:
            top = _all_reduce(log_sum, "max", group)
            parts = torch.stack([(log_sum - top).exp(), at_label])
            exp_sum, at_label = _all_reduce(parts, "sum", group).unbind()
            log_sum = exp_sum.log() + top
        valid = labels != IGNORED_LABEL
        ctx.save_for_backward(logits, index, log_sum, valid)
        ctx.overwritten = False
        return torch.where(valid, log_sum - at_label, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Softmax(z) - onehot(label), where z was."""
        if ctx.overwritten:
            raise RuntimeError("backward of the fused loss ran twice: the first overwrote the logits")
        ctx.overwritten = True
        logits, index, log_sum, valid = ctx.saved_tensors
        gradient = logits.detach()
        cross_entropy_gradient_(gradient, index, log_sum, torch.where(valid, grads[0], 0.0))
        return gradient, None, None, None


def _all_reduce(t: Tensor, op: str, group: str) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(t, op, group))
