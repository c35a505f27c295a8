"""The two kinds of source that windows come from, with one interface: text and token files.

A source yields windows from a position on, each with the position after it. A position is what resuming
needs: a place in the text's order, or the number of a window.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from trainer.data.datasets import DatasetRow, dataset_row
from trainer.data.documents import BadData
from trainer.data.encode import StreamPosition, TextStream
from trainer.data.identity import identify_files
from trainer.data.packing import pack_documents
from trainer.data.shuffle import ShuffledPosition, shuffle_windows, windows_per_block
from trainer.data.token_files import TokenFiles
from trainer.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class AnyWindow(Protocol):
    """S + 1 consecutive tokens of a stream, or fewer at its end."""

    def arrays(self, seq_len: int, padding_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and document ids, (S,) each."""
        ...


class Source(Protocol):
    """Where windows come from. A position is opaque but for `Source` itself.

    Attributes:
        label: The source as a user knows it.
        dataset: Its row of the table.
    """

    label: str
    dataset: str

    @property
    def identity(self) -> dict[str, Any]:
        """What data it reads, as plain values."""
        ...

    def begin(self) -> Any:
        """The position of the first window."""

    def windows(self, start: Any) -> Iterator[tuple[AnyWindow, Any]]:
        """Windows from a position on, each with the position after it."""

    def epoch(self, position: Any) -> int:
        """The epoch of a position, from 0."""

    def to_state(self, position: Any) -> dict[str, Any]:
        """A position as plain values."""

    def from_state(self, state: Mapping[str, Any], seq_len: int) -> Any:
        """The position of a `to_state` that was made with ``seq_len``."""


@dataclass(frozen=True)
class StreamSettings:
    """What all sources of a run share.

    Attributes:
        tokenizer: Of the run.
        seq_len: S.
        seed: Of all orders.
        infinite: Go on with the next epoch at the end of one.
        bos: Ids put before every document.
        eos: Ids put after every document.
        bad_data: What becomes of records that cannot be read.
        threads: Threads that tokenize.
    """

    tokenizer: Tokenizer
    seq_len: int
    seed: int
    infinite: bool
    bos: list[int]
    eos: list[int]
    bad_data: BadData
    threads: int


def open_source(dataset: str, path: str | None, text_field: str, settings: StreamSettings) -> Source:
    """Open a dataset as a source.

    Raises:
        ValueError: It does not exist, cannot be read, or was tokenized with another tokenizer.
    """
    row = dataset_row(dataset)
    row.check(path)
    label = f"{dataset}:{path}" if path else dataset
    if row.is_tokens:
        return TokenSource(label, dataset, str(path), settings)
    return TextSource(label, dataset, row, path, text_field, settings)


class TextSource:
    """Text that is tokenized as it comes: blocks of windows, shuffled within a block."""

    def __init__(
        self,
        label: str,
        dataset: str,
        row: DatasetRow,
        path: str | None,
        text_field: str,
        settings: StreamSettings,
    ) -> None:
        self.label, self.dataset = label, dataset
        self._row, self._path = row, path
        self._settings = settings
        if settings.infinite:
            _ = self.identity  # as the files are when the run begins
        self._stream = TextStream(
            source=partial(row.documents, path),
            tokenizer=settings.tokenizer,
            bos=settings.bos,
            eos=settings.eos,
            seed=settings.seed,
            infinite=settings.infinite,
            text_field=text_field,
            bad_data=settings.bad_data,
            threads=settings.threads,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What data it reads: marks of the files, or the reference."""
        if self._row.hub and (reference := self._row.hub(self._path)):
            return {"reference": reference}
        files = self._row.files(self._path) if self._row.files else []
        return identify_files(files, self._settings.bad_data.skip)

    def begin(self) -> ShuffledPosition:
        """The position of the first window."""
        return ShuffledPosition()

    def windows(self, start: ShuffledPosition) -> Iterator[tuple[AnyWindow, ShuffledPosition]]:
        """Windows from a position on, each with the position after it."""
        s = self._settings
        documents = self._stream.documents(start.block)
        windows = pack_documents(documents, s.seq_len, start.block.offset)
        # A finite pass reads everything, so its order does not matter.
        block = windows_per_block(s.seq_len) if s.infinite else 1
        return shuffle_windows(windows, start, s.seed, block)

    def epoch(self, position: ShuffledPosition) -> int:
        """The epoch in which the position's block begins."""
        return position.block.epoch

    def to_state(self, position: ShuffledPosition) -> dict[str, Any]:
        """A position as plain values."""
        return {"windows_into_block": position.windows_into_block, **asdict(position.block)}

    def from_state(self, state: Mapping[str, Any], seq_len: int) -> ShuffledPosition:
        """The position; with another sequence length, the current block is read again."""
        block = StreamPosition(
            epoch=int(state["epoch"]),
            document=int(state["document"]),
            offset=int(state["offset"]),
            name=state["name"],
            part=int(state["part"]),
        )
        behind = int(state["windows_into_block"])
        if seq_len != self._settings.seq_len:
            log.info(
                "seq_len changed from %d to %d: %d windows of the current block are read again",
                seq_len,
                self._settings.seq_len,
                behind,
            )
            behind = 0
        return ShuffledPosition(block, behind)


class TokenSource:
    """Token files: windows of the whole epoch in a random order, at any place at once."""

    def __init__(self, label: str, dataset: str, path: str, settings: StreamSettings) -> None:
        self.label, self.dataset = label, dataset
        self._settings = settings
        seed = settings.seed if settings.infinite else None
        self._files = TokenFiles(path, settings.seq_len, seed, settings.bos, settings.eos)
        manifest = self._files.manifest
        if manifest.tokenizer != settings.tokenizer.fingerprint:
            raise ValueError(
                f"{path}: was written with another tokenizer ({manifest.tokenizer}, "
                f"{manifest.vocab_size} ids)\n"
                f"  this run's model.hf_assets_path is {settings.tokenizer.fingerprint}, "
                f"{settings.tokenizer.vocab_size} ids\n"
                f"  set model.hf_assets_path={path}/tokenizer, or tokenize again"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What data it reads: the index holds the checksums of everything."""
        return {"index": self._files.manifest.digest[:32], "tokens": self._files.manifest.tokens}

    def begin(self) -> int:
        """The position of the first window."""
        return 0

    def windows(self, start: int) -> Iterator[tuple[AnyWindow, int]]:
        """Windows from a position on, each with the position after it."""
        for window in self._files.windows(start, self._settings.infinite):
            yield window, window.number + 1

    def epoch(self, position: int) -> int:
        """The epoch of a position, from 0."""
        return position // self._files.windows_per_epoch

    def to_state(self, position: int) -> dict[str, Any]:
        """A position as plain values."""
        return {"window": position, "epoch": self.epoch(position)}

    def from_state(self, state: Mapping[str, Any], seq_len: int) -> int:
        """The position; with another sequence length, the same number of tokens further on."""
        window = int(state["window"])
        if seq_len == self._settings.seq_len:
            return window
        epoch = int(state["epoch"])
        other = TokenFiles.count_windows(self._files.tokens, seq_len)
        into = -(-(window - epoch * other) * seq_len // self._settings.seq_len)
        log.info(
            "seq_len changed from %d to %d: windows are cut and ordered anew, so some text of epoch %d comes "
            "twice and some not at all",
            seq_len,
            self._settings.seq_len,
            epoch,
        )
        return epoch * self._files.windows_per_epoch + min(into, self._files.windows_per_epoch)
