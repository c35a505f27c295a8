"""Squares of gradients that somebody has added up on the way, so that clipping need not read the gradients.

Who writes a gradient (`parallelisms.fsdp_comm`) says so by `remember`; who wants norms
(`trainer.optim.clipping`) asks `recall`. What is remembered holds until the gradient's memory is written
again, which its version tells, or `forget`, before the next backward.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels.sum_chunks import SPAN


class _Known(NamedTuple):
    tensor: Tensor
    """What the squares are of: kept, so that nobody else can have its memory."""
    version: int
    squares: Tensor


_known: dict[int, _Known] = {}
"""Address of a tensor's storage -> what is known of it."""


def remember(tensor: Tensor, squares: Tensor) -> None:
    """`squares` (n / SPAN,) are those of each SPAN elements of `tensor` (n,), all of a storage.

    Gradients will be views of it.
    """
    _known[tensor.untyped_storage().data_ptr()] = _Known(tensor, tensor._version, squares)


def recall(gradient: Tensor) -> Tensor | None:
    """(spans,) fp32, whose sum is that of the squares of `gradient`; None where that is not known."""
    known = _known.get(gradient.untyped_storage().data_ptr())
    begin, size = gradient.storage_offset(), gradient.numel()
    if known is None or known.version != gradient._version or not gradient.is_contiguous():
        return None
    if begin % SPAN or size % SPAN or gradient.dtype != known.tensor.dtype:
        return None
    return known.squares[begin // SPAN : (begin + size) // SPAN]


def forget() -> None:
    """All of it: gradients may be freed."""
    _known.clear()
