"""What DTensor's own methods do not give."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(t: Tensor) -> Tensor:
    """This rank's part of a DTensor itself: `to_local` may give another wrapper around the same memory."""
    return t._local_tensor if isinstance(t, DTensor) else t
