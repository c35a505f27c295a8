"""Cross-entropy by rows, and its gradient written over the logits.

    lse[t] = log sum_v exp(z[t, v])        at_label[t] = z[t, index[t]]        CE[t] = lse[t] - at_label[t]
    z[t, v] <- (exp(z[t, v] - lse[t]) - [v = index[t]]) * factor[t]

An index outside [0, V) is in nobody's row: its at_label is 0 and nothing is taken off the softmax. That is
how ignored labels look, and under tensor parallelism those of another rank's shard of the vocabulary; the
caller combines shards, since lse and at_label are all that has to travel. Rows of factor 0 get gradient 0,
whatever their logits are. A NaN among the logits gives a NaN lse.

Where torch's form copies the logits to fp32 and keeps a log-softmax of that size, this one needs no memory
besides the logits, and moves 6 bytes a bf16 logit. All arithmetic is fp32; the gradient is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.operators import operator
from kernels.support import runs_triton


def row_sums_reference(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, at_label) of (T, V) logits and (T,) int64 indices, in plain PyTorch."""
    z = logits.float()
    inside = (index >= 0) & (index < z.shape[1])
    at_label = z.gather(1, torch.where(inside, index, 0)[:, None]).squeeze(1)
    return z.logsumexp(1), torch.where(inside, at_label, 0.0)


def gradient_reference(logits: Tensor, index: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
    """The gradient as a new tensor of the logits' dtype, in plain PyTorch."""
    here = torch.arange(logits.shape[1], device=logits.device) == index[:, None]
    probability = (logits.float() - lse[:, None]).exp()
    gradient = torch.where(here, probability - 1.0, probability) * factor[:, None]
    return torch.where(factor[:, None] == 0, 0.0, gradient).to(logits.dtype)


@operator("cross_entropy")
def cross_entropy(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, at_label), (T,) fp32 each, of (T, V) logits and (T,) int64 indices; without autograd formula."""
    if not runs_triton(logits.device):
        return row_sums_reference(logits, index)
    from kernels.triton.cross_entropy import launch_rows

    return launch_rows(_contiguous_rows(logits), index.contiguous())


@cross_entropy.register_fake
def _(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows)


@torch.library.custom_op("octavo::cross_entropy_gradient_", mutates_args={"logits"})
def cross_entropy_gradient_(logits: Tensor, index: Tensor, lse: Tensor, factor: Tensor) -> None:
    """Write the gradient over `logits`.

    Args:
        logits: (T, V) with contiguous rows.
        index: (T,) int64, as in forward.
        lse: (T,) fp32; over all shards, where there are several.
        factor: (T,) fp32: the upstream gradient, 0 where a row does not count.
    """
    if not runs_triton(logits.device):
        logits.copy_(gradient_reference(logits, index, lse, factor))
        return
    from kernels.triton.cross_entropy import launch_gradient

    assert logits.stride(1) == 1, "the gradient is written over the logits' own rows"
    launch_gradient(logits, index.contiguous(), lse, factor.contiguous())


@cross_entropy_gradient_.register_fake
def _(logits: Tensor, index: Tensor, lse: Tensor, factor: Tensor) -> None:
    return None


def _contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()
