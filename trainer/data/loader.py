"""The data loader: windows of the token stream, dealt to data-parallel ranks.

The stream of windows (`trainer.data.packing`, mixed by `trainer.data.shuffle`) is a pure function of
(dataset, tokenizer, seq_len, seed): windows are numbered 0, 1, 2, ... over epochs. Micro-batch m of rank r
out of R holds the B windows from ``first + (m * R + r) * B`` on, where ``first`` is the window at which the
run started or resumed. So a step of R ranks with one micro-batch each reads the windows that one rank reads
in R micro-batches, and a run resumes exactly on another number of ranks or another batch size.

The state is a position in the stream and is the same on every rank. Resuming seeks: it opens the data at
the document where the current block begins and tokenizes nothing before it.

Every rank tokenizes the whole stream in a background thread and keeps its own windows. That needs no
communication; its cost grows with the tokens per second of the whole run and not of the rank.

Shapes: B = local_batch_size, S = seq_len, R = dp_degree.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.data.datasets import check_dataset, dataset_row
from trainer.data.documents import DocumentSource
from trainer.data.packing import (
    IGNORED_LABEL,
    StreamPosition,
    Window,
    encode_documents,
    pack_documents,
)
from trainer.data.prefetch import Prefetcher
from trainer.data.shuffle import ShuffledPosition, shuffle_windows, windows_per_block
from trainer.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_PREFETCHED_BATCHES = 8
STATE_VERSION = 2


class Batch(NamedTuple):
    """One micro-batch of one rank, on the CPU.

    Attributes:
        tokens: (B, S) int64, the inputs.
        labels: (B, S) int64, the next tokens; `IGNORED_LABEL` only at the end of a finite pass.
        document_ids: (B, S) int64, from 0 in every row; attention may be masked to equal ids.
        label_count: Number of labels that are not `IGNORED_LABEL`: known here without a device sync.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    label_count: int


@dataclass(frozen=True)
class _Progress:
    """What was consumed: windows of all ranks together, and where in the stream the next one starts."""

    windows: int = 0
    position: ShuffledPosition = field(default_factory=ShuffledPosition)


@dataclass(frozen=True)
class _Plan:
    """All that decides the batches. Holds no loader, so that a thread working on it keeps none alive."""

    source: DocumentSource
    tokenizer: Tokenizer
    seq_len: int
    local_batch_size: int
    dp_rank: int
    dp_degree: int
    seed: int
    infinite: bool
    pin_memory: bool

    def batches(self, start: _Progress) -> Iterator[tuple[Batch, _Progress]]:
        """This rank's batches from ``start`` on, each with the progress after it."""
        documents = encode_documents(
            self.source, self.tokenizer, seed=self.seed, start=start.position.block, infinite=self.infinite
        )
        stream = pack_documents(documents, self.seq_len, start.position.block.offset)
        # A finite pass reads everything, so its order does not matter.
        block = windows_per_block(self.seq_len) if self.infinite else 1
        windows = shuffle_windows(stream, start.position, self.seed, block)
        group_size = self.dp_degree * self.local_batch_size
        first_own = self.dp_rank * self.local_batch_size
        progress = start
        while True:
            own: list[Window] = []
            taken = 0
            for taken, (window, after) in enumerate(itertools.islice(windows, group_size), start=1):
                if first_own < taken <= first_own + self.local_batch_size:
                    own.append(window)
                progress = replace(progress, position=after)
            if taken == 0:
                return
            progress = replace(progress, windows=progress.windows + taken)
            yield self._batch(own), progress

    def _batch(self, windows: list[Window]) -> Batch:
        """Stack windows; rows that the end of the data left empty are padding."""
        shape = (self.local_batch_size, self.seq_len)
        tokens = np.full(shape, self.tokenizer.eos_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        document_ids = np.zeros(shape, dtype=np.int64)
        for row, window in enumerate(windows):
            tokens[row], labels[row], document_ids[row] = window.arrays(self.seq_len, self.tokenizer.eos_id)
        label_count = int(np.count_nonzero(labels != IGNORED_LABEL))
        tensors = [torch.from_numpy(array) for array in (tokens, labels, document_ids)]
        if self.pin_memory:
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(tensors[0], tensors[1], tensors[2], label_count)


def _never() -> bool:
    return False


class DataLoader:
    """Iterates over one rank's batches; see the module's docstring for their order.

    An infinite loader goes on where it was left, however often it is iterated. A finite one (validation)
    starts a new pass over the same data with every ``iter``, except right after `load_state_dict`. All
    ranks see the same number of batches; at the end, rows without data have ignored labels only, so a
    rank's ``label_count`` may be 0.
    """

    def __init__(self, plan: _Plan, identity: dict[str, Any], prefetch_factor: int) -> None:
        self._plan = plan
        self._identity = identity
        self._prefetch_factor = prefetch_factor
        self._consumed = _Progress()
        self._begun = False
        self._batches: Prefetcher | None = None
        self.give_up: Callable[[], bool] = _never
        """Asked while a batch is waited for; once it is true, the wait ends with `WaitGivenUp`. Set it before
        iterating."""

    @property
    def epoch(self) -> int:
        """The epoch, from 0, in which the current block began."""
        return self._consumed.position.block.epoch

    @property
    def windows(self) -> int:
        """Windows consumed so far by all ranks together."""
        return self._consumed.windows

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; an error in the background thread is raised here."""
        if not self._plan.infinite and self._begun:
            self.close()
            self._consumed = _Progress()
        self._begun = True
        if self._batches is None:
            batches = self._plan.batches(self._consumed)
            self._batches = Prefetcher(batches, self._prefetch_factor, self._plan.pin_memory, self.give_up)
        source = self._batches
        try:
            for batch, progress in source:
                self._consumed = progress
                yield batch
        except Exception:
            if source is self._batches:
                self.close()  # so that another iter tries again instead of ending quietly
            raise

    def state_dict(self) -> dict[str, Any]:
        """Position after the batches consumed (not those prefetched); plain values, equal on all ranks."""
        return {
            "version": STATE_VERSION,
            "windows": self._consumed.windows,
            "seq_len": self._plan.seq_len,
            "windows_into_block": self._consumed.position.windows_into_block,
            **asdict(self._consumed.position.block),
            **self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, of any number of ranks or batch size: exactly.

        With another sequence length the current block is read again from its first token.

        Raises:
            ValueError: The state is of another dataset, seed or tokenizer.
        """
        expected = {"version": STATE_VERSION, **self._identity}
        for key, mine in expected.items():
            if state.get(key) != mine:
                raise ValueError(
                    f"the data loader's state does not fit: it was saved with {key} = {state.get(key)!r}\n"
                    f"  this run has {key} = {mine!r}\n"
                    "  set it as it was, or load the checkpoint without the data loader's state"
                )
        self.close()
        position = StreamPosition(
            epoch=int(state["epoch"]),
            document=int(state["document"]),
            offset=int(state["offset"]),
            name=state["name"],
        )
        into_block = int(state["windows_into_block"])
        if state["seq_len"] != self._plan.seq_len:
            logger.info(
                "seq_len changed from %d to %d: %d windows of the current block are read again",
                state["seq_len"],
                self._plan.seq_len,
                into_block,
            )
            into_block = 0
        self._consumed = _Progress(int(state["windows"]), ShuffledPosition(position, into_block))
        self._begun = False

    def close(self) -> None:
        """End the background thread; the position is kept, and iterating starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def build_dataloader(
    *,
    dataset: str,
    dataset_path: str | None = None,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int = 0,
    dp_degree: int = 1,
    seed: int = 0,
    infinite: bool = True,
    prefetch_factor: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Build one rank's loader.

    Args:
        dataset: A name in `trainer.data.datasets.DATASETS`.
        dataset_path: Where its files lie; None for the dataset's default.
        tokenizer: Encodes the documents.
        seq_len: S, tokens in a window's inputs.
        local_batch_size: B, windows in a batch.
        dp_rank: This rank's place among the data-parallel ranks; ranks that share a batch (tensor,
            context and pipeline parallel ones) share it.
        dp_degree: R, number of data-parallel ranks.
        seed: Decides the order of the documents.
        infinite: Go on with the next epoch, in another order, at the end of one.
        prefetch_factor: Batches that the background thread prepares ahead; None for a default, 0 for no
            thread.
        num_workers: Kept for configs written for torch's loader; one background thread of the training
            process does the work, so a number above 0 has no effect and is warned about.
        pin_memory: Page-locked tensors for copies that overlap with compute; needs CUDA.

    Raises:
        ValueError: The dataset or its path does not exist, or a size makes no sense.
    """
    check_dataset(dataset, dataset_path)
    for name, value, least in (
        ("seq_len", seq_len, 1),
        ("local_batch_size", local_batch_size, 1),
        ("prefetch_factor", prefetch_factor or 0, 0),
    ):
        if value < least:
            raise ValueError(f"{name} = {value} must be at least {least}")
    if not 0 <= dp_rank < dp_degree:
        raise ValueError(f"dp_rank = {dp_rank} must be from 0 to dp_degree - 1 = {dp_degree - 1}")
    if num_workers > 0:
        logger.warning("dataloader.num_workers = %d has no effect: one thread tokenizes ahead", num_workers)
    if pin_memory and not torch.cuda.is_available():
        logger.warning("dataloader.pin_memory has no effect: no CUDA device")
    plan = _Plan(
        source=partial(dataset_row(dataset).documents, dataset_path),
        tokenizer=tokenizer,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        seed=seed,
        infinite=infinite,
        pin_memory=pin_memory and torch.cuda.is_available(),
    )
    identity = {"dataset": dataset, "seed": seed, "tokenizer": tokenizer.fingerprint}
    ahead = DEFAULT_PREFETCHED_BATCHES if prefetch_factor is None else prefetch_factor
    return DataLoader(plan, identity, ahead)
