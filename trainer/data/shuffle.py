"""Mix the windows of the stream, so that a batch is not eight pieces of one document.

The stream is taken in blocks of about `BLOCK_TOKENS` tokens; within a block the windows come in an order
drawn from the seed and the block's place in the stream. So the order stays a pure function of (seed,
position), whatever the number of ranks, and resuming tokenizes one block again at most.

Documents are in random order already; a block only has to be longer than most documents, and short enough
that tokenizing it does not delay the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from trainer.data.encode import StreamPosition
from trainer.data.packing import Window

BLOCK_TOKENS = 131_072


@dataclass(frozen=True)
class ShuffledPosition:
    """A place in the shuffled stream: a block's first token, and how many of its windows are behind."""

    block: StreamPosition = field(default_factory=StreamPosition)
    windows_into_block: int = 0


def windows_per_block(seq_len: int) -> int:
    """Windows in a block: the same for everyone who reads windows of `seq_len`."""
    return max(1, BLOCK_TOKENS // seq_len)


def shuffle_windows(
    windows: Iterator[Window], start: ShuffledPosition, seed: int, block_size: int
) -> Iterator[tuple[Window, ShuffledPosition]]:
    """Yield windows, block after block, each with the place after it.

    Args:
        windows: The stream's windows from `start.block` on.
        start: Where to begin; the windows of its block that are behind are passed over.
        seed: Of the order.
        block_size: Windows in a block; 1 leaves the stream as it is.
    """
    place, behind = start.block, start.windows_into_block
    while block := list(islice(windows, block_size)):
        rng = np.random.default_rng([seed, place.epoch, place.part, place.document, place.offset])
        following = block[-1].following
        for count, number in enumerate(rng.permutation(len(block)).tolist(), start=1):
            if count > behind:
                done = count == len(block)
                yield block[number], ShuffledPosition(following) if done else ShuffledPosition(place, count)
        place, behind = following, 0
