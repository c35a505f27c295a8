"""From the global stream of windows to the batches of one rank; `trainer.data.loader` tells their order.

Shapes: B = local_batch_size, S = seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.data.mixture import Schedule
from trainer.data.packing import IGNORED_LABEL
from trainer.data.sources import AnyWindow, Source, StreamSettings


class Batch(NamedTuple):
    """One micro-batch of one rank, on the CPU.

    Attributes:
        tokens: (B, S) int64, the inputs.
        labels: (B, S) int64, the next tokens; `IGNORED_LABEL` only at the end of a pass over the data.
        document_ids: (B, S) int64, from 0 in every row; attention may be masked to equal ids.
        label_count: Number of labels that are not `IGNORED_LABEL`: known here without a device sync.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    label_count: int


@dataclass(frozen=True)
class Progress:
    """What was consumed: windows of all ranks together, and where in each source the next one starts."""

    windows: int
    positions: tuple[Any, ...]


@dataclass(frozen=True)
class BatchPlan:
    """All that decides the batches. Holds no loader, so that a thread working on it keeps none alive."""

    sources: tuple[Source, ...]
    schedule: Schedule | None
    settings: StreamSettings
    local_batch_size: int
    dp_rank: int
    dp_degree: int
    pin_memory: bool

    def begin(self) -> Progress:
        """Before the first window."""
        return Progress(0, tuple(source.begin() for source in self.sources))

    def windows(self, start: Progress) -> Iterator[tuple[AnyWindow, Progress]]:
        """The global stream from ``start`` on, each window with the progress after it."""
        streams: list[Iterator[tuple[AnyWindow, Any]] | None] = [None] * len(self.sources)
        number, positions = start.windows, start.positions
        while True:
            chosen = self.schedule.source(number) if self.schedule else 0
            stream = streams[chosen]
            if stream is None:  # opened when it is first needed
                stream = streams[chosen] = self.sources[chosen].windows(positions[chosen])
            found = next(stream, None)
            if found is None:
                return
            window, after = found
            number += 1
            positions = (*positions[:chosen], after, *positions[chosen + 1 :])
            yield window, Progress(number, positions)

    def batches(self, start: Progress) -> Iterator[tuple[Batch, Progress]]:
        """This rank's batches from ``start`` on, each with the progress after it."""
        windows = self.windows(start)
        group_size = self.dp_degree * self.local_batch_size
        first_own = self.dp_rank * self.local_batch_size
        progress = start
        while True:
            own: list[AnyWindow] = []
            taken = 0
            for taken, (window, after) in enumerate(islice(windows, group_size), start=1):
                if first_own < taken <= first_own + self.local_batch_size:
                    own.append(window)
                progress = after
            if taken == 0:
                return
            yield self._batch(own), progress

    def _batch(self, windows: list[AnyWindow]) -> Batch:
        """Stack windows; rows that the end of the data left empty are padding."""
        seq_len, eos_id = self.settings.seq_len, self.settings.tokenizer.eos_id
        shape = (self.local_batch_size, seq_len)
        tokens = np.full(shape, eos_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        document_ids = np.zeros(shape, dtype=np.int64)
        for row, window in enumerate(windows):
            tokens[row], labels[row], document_ids[row] = window.arrays(seq_len, eos_id)
        label_count = int(np.count_nonzero(labels != IGNORED_LABEL))
        tensors = [torch.from_numpy(array) for array in (tokens, labels, document_ids)]
        if self.pin_memory:
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(tensors[0], tensors[1], tensors[2], label_count)
