"""What a dataset yields, and the order that it is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One text with a name that says where it came from (a path, a path and line, a URL)."""

    name: str
    text: str


class DocumentOrder(NamedTuple):
    """Which order of a dataset's documents is asked for, and from where.

    The order is a pure function of (seed, epoch); ``start`` documents of it are left out, which is how
    a run resumes.
    """

    seed: int = 0
    epoch: int = 0
    start: int = 0

    def shuffle(self, items: list[Any], salt: str = "") -> None:
        """Shuffle in place, by (seed, epoch, salt) alone."""
        random.Random(f"octavo/{self.seed}/{self.epoch}/{salt}").shuffle(items)


DocumentSource = Callable[[DocumentOrder], Iterator[Document]]
"""A dataset whose path is settled: what packing and the loader read."""
