"""Perplexity of a trained model on any source that the data code knows.

The windows are those of the trainer's validation, and so is the loss::

    loss            mean cross-entropy a label, in nats
    ppl             exp(loss)
    bits per byte   sum of the cross-entropies / ln 2 / bytes of the text that the labels spell

Loss and ppl depend on the tokenizer, bits per byte hardly: it compares models with different ones. The bytes
are those of the decoded labels, in UTF-8, special tokens left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trainer.data.batches import Batch
from trainer.data.packing import IGNORED_LABEL
from trainer.data.tokenizer import Tokenizer
from trainer.interop.trained import LoadedModel
from trainer.loss import cross_entropy_sum


@dataclass(frozen=True)
class Perplexity:
    """See the module."""

    loss: float
    tokens: int
    """Labels that were predicted."""
    bytes: int
    """UTF-8 bytes of the text they spell."""
    batches: int

    @property
    def ppl(self) -> float:
        """Perplexity a token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that a byte of text costs."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


@torch.no_grad()
def perplexity(
    loaded: LoadedModel, batches: Iterable[Batch], tokenizer: Tokenizer, *, limit: int = -1
) -> Perplexity:
    """Evaluate.

    Args:
        loaded: The model, on one device.
        batches: Windows in the order of the stream.
        tokenizer: Of the model.
        limit: Batches to read; -1 for all.

    Raises:
        ValueError: there is no label.
    """
    total, tokens, count, text = 0.0, 0, 0, _ByteCounter(tokenizer)
    device = loaded.device
    for batch in batches:
        if count == limit:
            break
        ids = batch.document_ids.to(device) if loaded.document_mask else None
        logits = loaded.model(batch.tokens.to(device), ids)
        total += float(cross_entropy_sum(logits, batch.labels.to(device)))
        tokens += batch.label_count
        text.add(batch.labels[batch.labels != IGNORED_LABEL].tolist())
        count += 1
    if tokens == 0:
        raise ValueError("the data holds nothing to predict")
    return Perplexity(total / tokens, tokens, text.finish(), count)


class _ByteCounter:
    """Bytes of the text of a token stream, document by document: a character may span several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._bytes = tokenizer, 0
        self._open: list[int] = []
        self._special = {tokenizer.bos_id, tokenizer.eos_id}

    def add(self, ids: list[int]) -> None:
        for token in ids:
            if token not in self._special:
                self._open.append(token)
            elif token == self._tokenizer.eos_id:
                self._close()

    def finish(self) -> int:
        self._close()
        return self._bytes

    def _close(self) -> None:
        self._bytes += len(self._tokenizer.decode(self._open).encode("utf-8", "replace"))
        self._open = []
