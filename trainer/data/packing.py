r"""Documents to windows: the token stream and how it is cut.

Every document becomes ``[bos] + tokens + [eos]``, and all of them, one after the other, are the stream.
It is cut in windows of S + 1 tokens with stride S, so neighbours share one token::

    stream    bos a b eos bos c d e eos ...        S = 4
    window 0  [bos a b eos bos]                    inputs bos a b eos, labels a b eos bos
    window 1              [bos c d e eos]          inputs bos c d e,   labels c d e eos

Every token but the stream's first is a label exactly once, and none is lost: no padding between
documents, and a long document simply goes on in the next window. The first token of the next document is
a label of the eos before it. Only the end of a finite stream is padded, with labels `IGNORED_LABEL`.

``document_ids`` number the documents within a window from 0, so that attention can be masked to one
document: positions with the same id may see each other.

Shapes: S = seq_len.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.documents import Document, DocumentOrder, DocumentSource
from trainer.data.tokenizer import Tokenizer

IGNORED_LABEL = -100
"""The label that a loss leaves out; torch.nn.functional.cross_entropy's default."""

# Documents are tokenized in batches: large enough to feed several threads, small enough that the first
# batch of a run comes at once.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 262_144


@dataclass(frozen=True)
class StreamPosition:
    """A token of the stream: the ``offset``-th of a document (its bos and eos counted).

    ``document`` is the document's index in its epoch's order; ``name`` tells whether the data changed
    (None at the very start, before a document is known).
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0
    name: str | None = None


class EncodedDocument(NamedTuple):
    """One document as it stands in the stream, and where it comes in the order."""

    epoch: int
    number: int
    name: str
    tokens: np.ndarray


class Window(NamedTuple):
    """S + 1 consecutive tokens of the stream (fewer at its end), one piece a document.

    The pieces are views: a rank that only passes a window by copies nothing. ``following`` is where the
    next window starts, which is this one's last token.
    """

    pieces: tuple[np.ndarray, ...]
    following: StreamPosition

    def arrays(self, seq_len: int, padding_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and document ids, (S,) each; padding is a document of its own."""
        stream = np.concatenate(self.pieces)
        ids = np.repeat(np.arange(len(self.pieces)), [len(piece) for piece in self.pieces])
        padding = seq_len + 1 - len(stream)
        return (
            np.pad(stream[:-1], (0, padding), constant_values=padding_id),
            np.pad(stream[1:], (0, padding), constant_values=IGNORED_LABEL),
            np.pad(ids[:-1], (0, padding), constant_values=len(self.pieces)),
        )


def encode_documents(
    source: DocumentSource, tokenizer: Tokenizer, *, seed: int, start: StreamPosition, infinite: bool
) -> Iterator[EncodedDocument]:
    """Tokenize the documents from ``start``'s document on; with ``infinite``, epoch after epoch.

    Empty documents are left out (their index is still counted).

    Raises:
        ValueError: A whole epoch holds no text, or the document at ``start`` is another one than it was.
    """
    position = start
    while True:
        order = DocumentOrder(seed, position.epoch, position.document)
        found = position.document > 0
        for document in _encode_epoch(source(order), tokenizer, position):
            found = True
            yield document
        if not found:
            raise ValueError("the dataset holds no text: every document is empty\n  look at dataset_path")
        if not infinite:
            return
        position = StreamPosition(epoch=position.epoch + 1)


def _encode_epoch(
    documents: Iterator[Document], tokenizer: Tokenizer, position: StreamPosition
) -> Iterator[EncodedDocument]:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    index = position.document
    expected = position.name
    for batch in _batches(documents):
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            if expected is not None:
                _check_same(expected, document.name, position)
                expected = None
            if document.text:
                tokens = np.array([*bos, *ids, tokenizer.eos_id], dtype=np.int64)
                yield EncodedDocument(position.epoch, index, document.name, tokens)
            index += 1
    if expected is not None:
        _check_same(expected, "the end of the data", position)


def _check_same(expected: str, got: str, position: StreamPosition) -> None:
    if expected != got:
        raise ValueError(
            f"the data changed since the checkpoint: document {position.document} of epoch "
            f"{position.epoch} was {expected!r}\n"
            f"  got: {got!r}\n"
            "  restore the data, or load the checkpoint without the data loader's state"
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def pack_documents(documents: Iterator[EncodedDocument], seq_len: int, offset: int = 0) -> Iterator[Window]:
    """Cut the stream in windows, from the ``offset``-th token of the first document on.

    The last window of a finite stream may hold fewer than S + 1 tokens, but always a label.
    """
    pending: deque[tuple[EncodedDocument, int]] = deque()
    available = 0
    for document in documents:
        pending.append((document, offset))
        available += len(document.tokens) - offset
        offset = 0
        while available > seq_len:
            yield _cut(pending, seq_len + 1)
            available -= seq_len
    if available > 1:
        yield _cut(pending, available)


def _cut(pending: deque[tuple[EncodedDocument, int]], length: int) -> Window:
    """Take ``length`` tokens from the left, and leave the last of them as the next window's first."""
    pieces: list[np.ndarray] = []
    missing = length
    while True:
        document, offset = pending.popleft()
        piece = document.tokens[offset : offset + missing]
        pieces.append(piece)
        missing -= len(piece)
        if missing == 0:
            last = offset + len(piece) - 1
            pending.appendleft((document, last))
            following = StreamPosition(document.epoch, document.number, last, document.name)
            return Window(tuple(pieces), following)
