"""Cross-entropy, summed, so that the caller normalises it by the tokens of the whole step.

A step's loss is the sum over all valid tokens of all ranks and micro-batches, over their number::

    loss = sum_{r, a, t} CE(logits, label) / sum_{r, a} count(label != IGNORED_LABEL)

Every micro-batch is divided by that global count and gradients are *added* over micro-batches and ranks
(the data-parallel divide factor is 1), so the result does not depend on the layout, also where ranks hold
different numbers of ignored labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainer.data.packing import IGNORED_LABEL


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of all valid positions, in fp32.

    Args:
        logits: (B, S, V), any float dtype; raised to fp32 here.
        labels: (B, S) int64; IGNORED_LABEL positions count nothing.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
