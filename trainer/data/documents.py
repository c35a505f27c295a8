"""What a dataset yields, and what it is asked for."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

_NAMED_SKIPS = 5


class BadData:
    """What becomes of data that cannot be read: an error, or left out and counted.

    Left-out data is never silent: the first few are named in the log, then every tenfold of the count.

    Args:
        skip: Leave it out; otherwise the error is raised.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.skipped = 0
        self.first: list[str] = []

    def reject(self, error: ValueError) -> None:
        """Raise the error, or count it.

        Raises:
            ValueError: The policy is not to skip.
        """
        if not self.skip:
            raise error
        self.skipped += 1
        what = str(error).splitlines()[0]
        if len(self.first) < _NAMED_SKIPS:
            self.first.append(what)
            log.warning("bad data left out: %s", what)
        elif str(self.skipped).strip("0") == "1":
            log.warning("bad data left out: %d documents or files so far; now %s", self.skipped, what)


class Document(NamedTuple):
    """One text, or a piece of one.

    Attributes:
        name: Where it came from (a path, a path and line, a URL).
        text: The text; an empty one is left out, but its place is counted.
        part: Index of the file (or other part) that it is from, in the order asked for. A resumed run
            opens that part and none before it; a dataset that can seek leaves it at 0.
        opens: It begins here; False for a later piece of a text that is read piece by piece.
        closes: It ends here.
    """

    name: str
    text: str
    part: int = 0
    opens: bool = True
    closes: bool = True


class DocumentOrder(NamedTuple):
    """Which documents are asked for, and in which order.

    The order is a pure function of (seed, epoch). A run resumes at ``part``, of which ``start`` documents
    are left out.

    Attributes:
        seed: Of the order.
        epoch: From 0.
        start: Documents of ``part`` that are left out.
        part: First part that is wanted.
        text_field: Field or column that holds the text, where records have fields.
        bad_data: What becomes of records that cannot be read.
        pieces: Long texts may come in pieces, each beginning with an ASCII letter after a newline.
    """

    seed: int = 0
    epoch: int = 0
    start: int = 0
    part: int = 0
    text_field: str = "text"
    bad_data: BadData = BadData()
    pieces: bool = False

    def shuffle(self, items: list[Any], salt: str = "") -> None:
        """Shuffle in place, by (seed, epoch, salt) alone."""
        random.Random(f"octavo/{self.seed}/{self.epoch}/{salt}").shuffle(items)


DocumentSource = Callable[[DocumentOrder], Iterator[Document]]
"""A dataset whose path is settled: what packing and the loader read."""
