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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.encode import EncodedDocument, StreamPosition

IGNORED_LABEL = -100
"""The label that a loss leaves out; torch.nn.functional.cross_entropy's default."""


class Window(NamedTuple):
    """S + 1 consecutive tokens of the stream (fewer at its end), one piece a document.

    The pieces are views: a rank that only passes a window by copies nothing. ``following`` is where the
    next window starts, which is this one's last token.
    """

    pieces: tuple[np.ndarray, ...]
    following: StreamPosition

    def arrays(self, seq_len: int, padding_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and document ids, (S,) each."""
        return window_arrays(self.pieces, seq_len, padding_id)


def window_arrays(
    pieces: Sequence[np.ndarray], seq_len: int, padding_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and document ids of a window, (S,) each; padding is a document of its own."""
    stream = np.concatenate(pieces)
    ids = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    padding = seq_len + 1 - len(stream)
    return (
        np.pad(stream[:-1], (0, padding), constant_values=padding_id),
        np.pad(stream[1:], (0, padding), constant_values=IGNORED_LABEL),
        np.pad(ids[:-1], (0, padding), constant_values=len(pieces)),
    )


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
        if pieces and not document.opens:  # the same text, read in pieces
            pieces[-1] = np.concatenate([pieces[-1], piece])
        else:
            pieces.append(piece)
        missing -= len(piece)
        if missing == 0:
            last = offset + len(piece) - 1
            pending.appendleft((document, last))
            following = StreamPosition(document.epoch, document.number, last, document.name, document.part)
            return Window(tuple(pieces), following)
