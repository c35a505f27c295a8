"""Documents to tokens: tokenized in parallel, in the order in which they come.

Batches of documents go to threads (the tokenizers' libraries release Python's lock while they work) and
come back in their order, so the number of threads changes nothing but the speed. Nothing here draws random
numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainer.data.documents import BadData, Document, DocumentOrder, DocumentSource
from trainer.data.tokenizer import Tokenizer, text_pieces

# Documents are tokenized in batches: large enough to be worth a thread's turn, small enough that the first
# batch of a run comes at once.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 262_144
PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class StreamPosition:
    """A token of the stream: the ``offset``-th of a document (its bos and eos counted).

    ``document`` is the document's index in its ``part`` of its epoch's order; ``name`` tells whether the
    data changed (None at the very start, before a document is known).
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0
    name: str | None = None
    part: int = 0


class EncodedDocument(NamedTuple):
    """One document (or piece of one) as it stands in the stream, and where it comes in the order."""

    epoch: int
    number: int
    name: str
    tokens: np.ndarray
    part: int = 0
    opens: bool = True


@dataclass(frozen=True)
class TextStream:
    """A dataset's documents as tokens, epoch after epoch; see `trainer.data.documents` for the order.

    Attributes:
        source: Yields the documents.
        tokenizer: Encodes them.
        bos: Ids put before every document.
        eos: Ids put after every document.
        seed: Of the order.
        infinite: Go on with the next epoch at the end of one.
        text_field: Field or column that holds the text.
        bad_data: What becomes of records that cannot be read.
        threads: Threads that tokenize; 1 tokenizes in the caller.
    """

    source: DocumentSource
    tokenizer: Tokenizer
    bos: list[int]
    eos: list[int]
    seed: int = 0
    infinite: bool = True
    text_field: str = "text"
    bad_data: BadData = field(default_factory=BadData)
    threads: int = 1

    def documents(self, start: StreamPosition) -> Iterator[EncodedDocument]:
        """Tokenize from ``start``'s document on.

        Empty documents are left out (their index is still counted).

        Raises:
            ValueError: A whole epoch holds no text, or the document at ``start`` is another than it was.
        """
        position = start
        while True:
            found = position.document > 0 or position.part > 0
            for document in self._epoch(position):
                found = True
                yield document
            if not found:
                raise ValueError("the dataset holds no text: every document is empty\n  look at dataset_path")
            if not self.infinite:
                return
            position = StreamPosition(epoch=position.epoch + 1)

    def _epoch(self, position: StreamPosition) -> Iterator[EncodedDocument]:
        order = DocumentOrder(
            self.seed,
            position.epoch,
            position.document,
            position.part,
            self.text_field,
            self.bad_data,
            self.tokenizer.splits_at_lines,
        )
        part, index, expected = position.part, position.document, position.name
        for batch, encoded in encode_batches(
            batch_documents(self.source(order)), self.tokenizer, self.threads
        ):
            for document, ids in zip(batch, encoded, strict=True):
                if expected is not None:
                    _check_same(expected, document.name, position)
                    expected = None
                if document.part != part:
                    part, index = document.part, 0
                around = [self.bos if document.opens else [], ids, self.eos if document.closes else []]
                if document.text or not (document.opens and document.closes):
                    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in around])
                    if len(tokens):
                        yield EncodedDocument(
                            position.epoch, index, document.name, tokens, part, document.opens
                        )
                index += 1
        if expected is not None:
            _check_same(expected, "the end of the data", position)


def encode_batches(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[list[Document], list[np.ndarray]]]:
    """Each batch with the ids of its documents, in order; ``threads`` batches are in work at a time."""
    if threads <= 1:
        for batch in batches:
            yield batch, encode_texts(tokenizer, [document.text for document in batch])
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="octavo-tokenizer")
    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    try:
        for batch in batches:
            texts = [document.text for document in batch]
            waiting.append((batch, pool.submit(encode_texts, tokenizer, texts)))
            # The first batch of a run is not made to wait for others.
            while waiting and (len(waiting) > threads or waiting[0][1].done()):
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, in one thread; a long text goes through the tokenizer in pieces where it may.

    Tokenizers need many times the memory of the text; the pieces have the ids of the whole.
    """
    found = []
    short: list[str] = []
    for text in texts:
        if len(text) <= PIECE_CHARACTERS or not tokenizer.splits_at_lines:
            short.append(text)
            continue
        found += tokenizer.encode_arrays(short)
        short = []
        pieces = text_pieces(text, PIECE_CHARACTERS)
        found.append(np.concatenate([tokenizer.encode_arrays([piece])[0] for piece in pieces]))
    return found + tokenizer.encode_arrays(short)


def _check_same(expected: str, got: str, position: StreamPosition) -> None:
    if expected != got:
        raise ValueError(
            f"the data changed since the checkpoint: document {position.document} of epoch "
            f"{position.epoch} was {expected!r}\n"
            f"  got: {got!r}\n"
            "  restore the data, or load the checkpoint without the data loader's state"
        )


def batch_documents(
    documents: Iterator[Document], most: int = BATCH_DOCUMENTS, characters: int = BATCH_CHARACTERS
) -> Iterator[list[Document]]:
    """Documents in lists of at most ``most``, or about ``characters``."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if len(batch) >= most or held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
