"""The data loader: windows of the token stream, dealt to data-parallel ranks.

The stream of windows is a pure function of (datasets, tokenizer, seq_len, seed): windows are numbered
0, 1, 2, ... over epochs; in a mixture, the number of a window decides which source it comes from
(`trainer.data.mixture`). Micro-batch m of rank r out of R holds the B windows from
``first + (m * R + r) * B`` on, where ``first`` is the window at which the run started or resumed. So a step
of R ranks with one micro-batch each reads the windows that one rank reads in R micro-batches, and a run
resumes exactly on another number of ranks or another batch size.

The state is a position in each source and is the same on every rank. Resuming seeks: token files are
entered at the very window; of text, the file is opened in which the current block begins, and nothing
before the block is tokenized.

Every rank walks the whole stream in a background thread and keeps its own windows. That needs no
communication. With token files, windows of others cost nothing; text is tokenized by every rank, at a cost
that grows with the tokens per second of the whole run and not of the rank.

Shapes: B = local_batch_size, S = seq_len, R = dp_degree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trainer.data.batches import Batch, BatchPlan, Progress
from trainer.data.documents import BadData
from trainer.data.identity import what_changed
from trainer.data.mixture import Entry, Schedule, parse_mixture
from trainer.data.prefetch import Prefetcher
from trainer.data.sources import Source, StreamSettings, open_source
from trainer.data.tokenizer import Tokenizer, tokenizer_threads

logger = logging.getLogger(__name__)

DEFAULT_PREFETCHED_BATCHES = 8
STATE_VERSION = 3


def _never() -> bool:
    return False


class DataLoader:
    """Iterates over one rank's batches; see the module's docstring for their order.

    An infinite loader goes on where it was left, however often it is iterated. A finite one (validation)
    starts a new pass over the same data with every ``iter``, except right after `load_state_dict`. All
    ranks see the same number of batches; at the end, rows without data have ignored labels only, so a
    rank's ``label_count`` may be 0.
    """

    def __init__(self, plan: BatchPlan, prefetch_factor: int) -> None:
        self._plan = plan
        self._prefetch_factor = prefetch_factor
        self._consumed = plan.begin()
        self._begun = False
        self._batches: Prefetcher | None = None
        self.give_up: Callable[[], bool] = _never
        """Asked while a batch is waited for; once it is true, the wait ends with `WaitGivenUp`. Set it before
        iterating."""

    @property
    def epochs(self) -> list[int]:
        """The epoch of each source, from 0; of text, that in which the current block began."""
        pairs = zip(self._plan.sources, self._consumed.positions, strict=True)
        return [source.epoch(position) for source, position in pairs]

    @property
    def epoch(self) -> int:
        """The epoch of the source that is furthest, from 0."""
        return max(self.epochs)

    @property
    def windows(self) -> int:
        """Windows consumed so far by all ranks together."""
        return self._consumed.windows

    @property
    def skipped(self) -> int:
        """Documents and files left out as bad data, by this process."""
        return self._plan.settings.bad_data.skipped

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; an error in the background thread is raised here."""
        if not self._plan.settings.infinite and self._begun:
            self.close()
            self._consumed = self._plan.begin()
        self._begun = True
        if self._batches is None:
            batches = self._plan.batches(self._consumed)
            self._batches = Prefetcher(batches, self._prefetch_factor, self._plan.pin_memory, self.give_up)
        source = self._batches
        try:
            for batch, progress in source:
                before, self._consumed = self._consumed, progress
                self._announce_epochs(before)
                yield batch
        except Exception:
            if source is self._batches:
                self.close()  # so that another iter tries again instead of ending quietly
            raise

    def _announce_epochs(self, before: Progress) -> None:
        if not self._plan.settings.infinite:
            return
        for source, old, new in zip(
            self._plan.sources, before.positions, self._consumed.positions, strict=True
        ):
            if source.epoch(new) > source.epoch(old):
                logger.info("data: epoch %d of %s begins", source.epoch(new) + 1, source.label)

    def state_dict(self) -> dict[str, Any]:
        """Position after the batches consumed (not those prefetched); plain values, equal on all ranks."""
        sources = [
            {
                "dataset": source.dataset,
                "data": source.identity,
                **source.to_state(position),
            }
            for source, position in zip(self._plan.sources, self._consumed.positions, strict=True)
        ]
        return {
            "version": STATE_VERSION,
            "windows": self._consumed.windows,
            "seq_len": self._plan.settings.seq_len,
            **self._shared_identity(),
            "sources": sources,
        }

    def _shared_identity(self) -> dict[str, Any]:
        s = self._plan.settings
        return {"seed": s.seed, "tokenizer": s.tokenizer.fingerprint, "bos": s.bos, "eos": s.eos}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, of any number of ranks or batch size: exactly.

        With another sequence length, text reads the current block again from its first token, and token
        files go on after as many tokens.

        Raises:
            ValueError: The state is of another dataset, seed or tokenizer, or the data changed.
        """
        for key, mine in {"version": STATE_VERSION, **self._shared_identity()}.items():
            _check_equal(key, state.get(key), mine)
        names = [source["dataset"] for source in state["sources"]]
        mine = [source.dataset for source in self._plan.sources]
        if len(names) == len(mine) == 1:
            _check_equal("dataset", names[0], mine[0])
        _check_equal("datasets", names, mine)
        for source, saved in zip(self._plan.sources, state["sources"], strict=True):
            _check_unchanged(source, saved["data"])
        self.close()
        seq_len = int(state["seq_len"])
        positions = [
            source.from_state(saved, seq_len)
            for source, saved in zip(self._plan.sources, state["sources"], strict=True)
        ]
        self._consumed = Progress(int(state["windows"]), tuple(positions))
        self._begun = False

    def close(self) -> None:
        """End the background thread; the position is kept, and iterating starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _check_equal(key: str, saved: Any, mine: Any) -> None:
    if saved != mine:
        raise ValueError(
            f"the data loader's state does not fit: it was saved with {key} = {saved!r}\n"
            f"  this run has {key} = {mine!r}\n"
            "  set it as it was, or load the checkpoint without the data loader's state"
        )


def _check_unchanged(source: Source, saved: Mapping[str, Any]) -> None:
    change = what_changed(saved, source.identity)
    if change is not None:
        raise ValueError(
            f"the data changed since the checkpoint: {source.label}\n"
            f"  got: {change}\n"
            "  restore the data, or load the checkpoint without the data loader's state"
        )


def build_dataloader(
    *,
    dataset: str = "python_sources",
    dataset_path: str | None = None,
    text_field: str = "text",
    mixture: Sequence[str] = (),
    bad_data: str = "refuse",
    add_bos: bool = True,
    add_eos: bool = True,
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
        text_field: Field or column that holds the text, where records have fields.
        mixture: Entries of `trainer.data.mixture` in place of ``dataset`` and ``dataset_path``.
        bad_data: "refuse" or "skip" records and files that cannot be read.
        add_bos: Put the tokenizer's bos before every document, where it has one.
        add_eos: Put the tokenizer's eos after every document.
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
        num_workers: Threads that tokenize; 0 shares the host's cores among its ranks.
        pin_memory: Page-locked tensors for copies that overlap with compute; needs CUDA.

    Raises:
        ValueError: A dataset or its path does not exist, or a size makes no sense.
    """
    for name, value, least in (
        ("seq_len", seq_len, 1),
        ("local_batch_size", local_batch_size, 1),
        ("prefetch_factor", prefetch_factor or 0, 0),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} = {value} must be at least {least}")
    if not 0 <= dp_rank < dp_degree:
        raise ValueError(f"dp_rank = {dp_rank} must be from 0 to dp_degree - 1 = {dp_degree - 1}")
    if pin_memory and not torch.cuda.is_available():
        logger.warning("dataloader.pin_memory has no effect: no CUDA device")
    settings = StreamSettings(
        tokenizer=tokenizer,
        seq_len=seq_len,
        seed=seed,
        infinite=infinite,
        bos=[tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else [],
        eos=[tokenizer.eos_id] if add_eos else [],
        bad_data=BadData(skip=bad_data == "skip"),
        threads=num_workers or tokenizer_threads(),
    )
    if mixture and not infinite:
        raise ValueError("a mixture has no end, so it cannot be read in one finite pass")
    entries = parse_mixture(mixture) if mixture else [Entry(dataset, dataset_path, text_field, 1.0)]
    sources = [open_source(e.dataset, e.path, e.text_field or text_field, settings) for e in entries]
    plan = BatchPlan(
        sources=tuple(sources),
        schedule=Schedule([entry.weight for entry in entries], seed) if len(entries) > 1 else None,
        settings=settings,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        pin_memory=pin_memory and torch.cuda.is_available(),
    )
    ahead = DEFAULT_PREFETCHED_BATCHES if prefetch_factor is None else prefetch_factor
    return DataLoader(plan, ahead)
