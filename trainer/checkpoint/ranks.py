"""The ranks that save and load together: a few exchanges of small objects, over gloo.

They have a process group of their own, so that a save may go on in a background thread while training
sends its own messages; at any time only one of the two uses it. What travels is made by this run's own
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.files import CheckpointError

# The slowest rank may write for long while the others wait.
_TIMEOUT = timedelta(hours=2)


class Ranks:
    """All ranks of the run; a process without a process group is alone."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if several else None
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which does what is done once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def first_does(self, work: Callable[[], Any]) -> Any:
        """Rank 0 does `work`; every rank has its result, or its error.

        Raises:
            CheckpointError: what `work` raised, an OSError included.
        """
        result, error = attempt(work) if self.is_first else (None, None)
        result, error = self.share((result, error))
        if error is not None:
            raise CheckpointError(error)
        return result

    def all_do(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank does its `work`; every rank has all results, or the first error of any.

        Raises:
            CheckpointError: what one of them raised.
        """
        outcomes: Sequence[tuple[Any, str | None]] = self.gather(attempt(work))
        for _, error in outcomes:
            if error is not None:
                raise CheckpointError(error)
        return [result for result, _ in outcomes]


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, the message of a CheckpointError or OSError)."""
    try:
        return work(), None
    except CheckpointError as error:
        return None, str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return None, f"{where}{error.strerror or error}"
