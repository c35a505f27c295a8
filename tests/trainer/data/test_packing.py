from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.documents import Document
from trainer.data.encode import EncodedDocument, StreamPosition, TextStream
from trainer.data.packing import IGNORED_LABEL, pack_documents

PADDING_ID = 999


def encoded(lengths: list[int]) -> list[EncodedDocument]:
    starts = np.cumsum([0, *lengths])
    return [EncodedDocument(0, i, f"d{i}", np.arange(starts[i], starts[i + 1])) for i in range(len(lengths))]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 24))
def test_every_token_is_predicted_once_from_the_one_before_it(lengths, seq_len):
    documents = encoded(lengths)  # tokens 0, 1, 2, ... so that a label is its input plus one
    labels = []
    for window in pack_documents(iter(documents), seq_len):
        inputs, targets, ids = window.arrays(seq_len, PADDING_ID)
        assert inputs.shape == targets.shape == ids.shape == (seq_len,)
        real = targets != IGNORED_LABEL
        assert (targets[real] == inputs[real] + 1).all()
        assert (inputs[~real] == PADDING_ID).all()
        owner = np.searchsorted(np.cumsum(lengths), inputs[real], side="right")
        assert ids[0] == 0
        assert (ids[real] == owner - owner[0]).all()  # no id is skipped, and equal ids mean one document
        assert not set(ids[real]) & set(ids[~real])
        labels += targets[real].tolist()
    assert labels == list(range(1, sum(lengths)))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(1, 16), st.data())
def test_packing_goes_on_from_where_a_window_ends(lengths, seq_len, data):
    documents = encoded(lengths)
    windows = list(pack_documents(iter(documents), seq_len))
    if not windows:
        return
    k = data.draw(st.integers(0, len(windows) - 1))
    position = windows[k].following
    rest = pack_documents(iter(documents[position.document :]), seq_len, position.offset)
    expected = [window.arrays(seq_len, PADDING_ID) for window in windows[k + 1 :]]
    assert [[a.tolist() for a in w.arrays(seq_len, PADDING_ID)] for w in rest] == [
        [a.tolist() for a in arrays] for arrays in expected
    ]


def test_documents_are_wrapped_and_empty_ones_left_out(tokenizer):
    documents = [Document("a", "one"), Document("empty", ""), Document("b", "two")]
    stream = TextStream(
        lambda order: iter(documents), tokenizer, [tokenizer.bos_id], [tokenizer.eos_id], infinite=False
    )
    found = list(stream.documents(StreamPosition()))
    assert [(d.number, d.name) for d in found] == [(0, "a"), (2, "b")]
    assert [tokenizer.decode(d.tokens.tolist()) for d in found] == [
        "<|begin_of_text|>one<|end_of_text|>",
        "<|begin_of_text|>two<|end_of_text|>",
    ]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_dataset_without_text_is_an_error_and_not_an_endless_loop(tokenizer, texts):
    documents = [Document("x", text) for text in texts]
    stream = TextStream(lambda order: iter(documents), tokenizer, [0], [1])
    with pytest.raises(ValueError, match="holds no text"):
        next(stream.documents(StreamPosition()))
