from __future__ import annotations

import gc
import itertools
import json
import logging
import random
import threading

import numpy as np
import pytest
import torch

from trainer.data.datasets import DATASETS, DatasetRow
from trainer.data.documents import Document, DocumentOrder
from trainer.data.encode import StreamPosition
from trainer.data.loader import build_dataloader
from trainer.data.packing import IGNORED_LABEL, Window
from trainer.data.shuffle import ShuffledPosition, shuffle_windows, windows_per_block

S, B, SEED = 16, 2, 3


def take(loader, count: int):
    return list(itertools.islice(iter(loader), count))


def reference_stream(tokenizer, epochs: int) -> np.ndarray:
    """The token stream, written down without any of the code under test but the document order."""
    ids = []
    for epoch in range(epochs):
        for _, text, *_ in DATASETS["toy"].documents(None, DocumentOrder(SEED, epoch)):
            if text:
                ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return np.array(ids)


def rows_in_global_order(per_rank: list[list], field: str) -> np.ndarray:
    """(windows, S): micro-batch by micro-batch, rank by rank, row by row."""
    return np.concatenate(
        [getattr(batch, field).numpy() for group in zip(*per_rank, strict=True) for batch in group]
    )


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("prefetch_factor", [0, 3])
def test_the_global_stream_does_not_depend_on_the_number_of_ranks(build_toy, tokenizer, R, prefetch_factor):
    epochs = 4
    stream = reference_stream(tokenizer, epochs)
    block = windows_per_block(S)
    windows = (len(stream) - 1) // S // block * block  # whole blocks: each is a permutation of its windows
    loaders = [build_toy(dp_rank=r, dp_degree=R, prefetch_factor=prefetch_factor) for r in range(R)]
    per_rank = [take(loader, windows // (R * B)) for loader in loaders]
    straight = np.lib.stride_tricks.sliding_window_view(stream, S + 1)[::S][:windows]
    tokens = rows_in_global_order(per_rank, "tokens")
    labels = rows_in_global_order(per_rank, "labels")
    seen = np.concatenate([tokens, labels[:, -1:]], axis=1)
    for start in range(0, windows, block):
        piece = slice(start, start + block)
        assert sorted(map(tuple, seen[piece])) == sorted(map(tuple, straight[piece]))
    assert not np.array_equal(seen, straight)
    # On one rank, one way: the order that every other number of ranks must give too.
    alone = take(build_toy(), windows // B)
    expected = np.concatenate([batch.tokens.numpy() for batch in alone])
    expected = np.concatenate([expected, np.concatenate([b.labels.numpy()[:, -1:] for b in alone])], axis=1)
    np.testing.assert_array_equal(rows_in_global_order(per_rank, "tokens"), expected[:, :-1])
    np.testing.assert_array_equal(rows_in_global_order(per_rank, "labels"), expected[:, 1:])
    starts = expected[:, :-1] == tokenizer.bos_id
    starts[:, 0] = False
    np.testing.assert_array_equal(rows_in_global_order(per_rank, "document_ids"), starts.cumsum(axis=1))
    assert all(batch.label_count == B * S for batches in per_rank for batch in batches)
    assert {loader.epoch for loader in loaders} == {epochs - 1}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Blocks of eight windows, so that these short streams have several."""
    monkeypatch.setattr("trainer.data.shuffle.BLOCK_TOKENS", 8 * S)


def test_batches_are_int64_tensors_and_seeds_differ(build_toy):
    batch = take(build_toy(), 1)[0]
    for tensor in batch[:3]:
        assert tensor.shape == (B, S)
        assert tensor.dtype == torch.int64
    assert not torch.equal(take(build_toy(seed=4), 1)[0].tokens, batch.tokens)


@pytest.mark.parametrize("new_degree", [1, 2, 4])
@pytest.mark.parametrize("consumed", [0, *random.Random(0).sample(range(60), 4)])
def test_resume_is_exact_also_on_another_number_of_ranks(build_toy, consumed, new_degree):
    old = build_toy(dp_degree=2, dp_rank=1)
    take(old, consumed)
    state = old.state_dict()
    assert state["windows"] == consumed * 2 * B
    assert json.loads(json.dumps(state)) == state
    other_rank = build_toy(dp_degree=2, dp_rank=0)
    take(other_rank, consumed)
    assert other_rank.state_dict() == state

    unbroken = rows_in_global_order([take(build_toy(), 100 + 2 * consumed)], "tokens")[consumed * 2 * B :]
    loaders = [build_toy(dp_rank=r, dp_degree=new_degree) for r in range(new_degree)]
    for loader in loaders:
        loader.load_state_dict(state)
    resumed = rows_in_global_order([take(loader, 10) for loader in loaders], "tokens")
    np.testing.assert_array_equal(resumed, unbroken[: len(resumed)])
    assert loaders[0].windows == (consumed * 2 + 10 * new_degree) * B


def test_resume_with_another_length_reads_the_block_again(build_toy, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    stream = reference_stream(tokenizer, 2)
    loader = build_toy(seq_len=16, local_batch_size=1)
    take(loader, 8 + 3)  # one block of 128 tokens, and three windows of the next
    longer = build_toy(seq_len=32, local_batch_size=1)
    longer.load_state_dict(loader.state_dict())
    seen = {tuple(batch.tokens[0].tolist()) for batch in take(longer, 4)}
    assert seen == {tuple(stream[128 + 32 * i : 160 + 32 * i]) for i in range(4)}
    assert "3 windows of the current block are read again" in caplog.text


def test_the_state_counts_what_was_consumed_and_iterating_goes_on(build_toy):
    whole = take(build_toy(), 9)
    loader = build_toy()
    parts = take(loader, 4)
    assert loader.state_dict()["windows"] == 4 * B
    parts += take(loader, 2)
    loader.close()
    parts += take(loader, 3)
    for mine, expected in zip(parts, whole, strict=True):
        assert torch.equal(mine.tokens, expected.tokens)


def test_a_state_that_does_not_fit_is_refused(build_toy, monkeypatch):
    loader = build_toy()
    take(loader, 3)
    state = loader.state_dict()
    for change in ({"seed": 4}, {"tokenizer": "other"}, {"eos": []}, {"version": 0}):
        with pytest.raises(ValueError, match=f"saved with {next(iter(change))} = "):
            build_toy().load_state_dict({**state, **change})

    def other(**change):
        return {**state, "sources": [{**state["sources"][0], **change}]}

    with pytest.raises(ValueError, match="saved with dataset = 'c4'"):
        build_toy().load_state_dict(other(dataset="c4"))
    with pytest.raises(ValueError, match="saved with datasets = "):
        build_toy().load_state_dict({**state, "sources": state["sources"] * 2})
    changed = build_toy()
    changed.load_state_dict(other(name="toy:gone"))
    with pytest.raises(ValueError, match="the data changed since the checkpoint"):
        take(changed, 1)
    changed.load_state_dict(other(document=10_000, name="toy:gone"))
    with pytest.raises(ValueError, match="got: 'the end of the data'"):
        take(changed, 1)


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [7, 16, 300, 5000])
def test_a_finite_pass_loses_no_token_and_every_rank_counts_alike(build_toy, tokenizer, R, seq_len):
    stream = reference_stream(tokenizer, 1)
    loaders = [build_toy(dp_rank=r, dp_degree=R, infinite=False, seq_len=seq_len) for r in range(R)]
    per_rank = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in per_rank}) == 1
    labels = rows_in_global_order(per_rank, "labels").ravel()
    assert labels[labels != IGNORED_LABEL].tolist() == stream[1:].tolist()
    assert sum(batch.label_count for batches in per_rank for batch in batches) == len(stream) - 1
    assert per_rank[0][-1].label_count > 0
    assert {loader.epoch for loader in loaders} == {0}


def test_every_finite_pass_is_the_same_and_can_be_resumed(build_toy):
    loader = build_toy(infinite=False)
    whole = list(loader)
    take(loader, 3)  # a pass that is left early
    again = list(loader)
    assert len(again) == len(whole)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, whole, strict=True))
    take(loader, 3)
    resumed = build_toy(infinite=False)
    resumed.load_state_dict(loader.state_dict())
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(resumed, whole[3:], strict=True))
    assert list(loader) != []
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []  # the state of a pass that has ended


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "octavo-data"]


@pytest.mark.parametrize("prefetch_factor", [0, 4])
def test_an_error_in_the_background_is_raised_to_the_consumer(tokenizer, tmp_path, prefetch_factor):
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' * 20 + "{broken\n")
    loader = build_dataloader(
        dataset="text_files",
        dataset_path=str(tmp_path),
        tokenizer=tokenizer,
        seq_len=4,
        local_batch_size=1,
        prefetch_factor=prefetch_factor,
    )
    for _ in range(2):  # and again, rather than a quiet end
        with pytest.raises(ValueError, match=r"data\.jsonl, line 21: not valid JSON"):
            list(loader)
    assert data_threads() == []


def test_the_thread_ends_with_the_loader(build_toy, tokenizer, monkeypatch):
    loader = build_toy()
    iterator = iter(loader)
    next(iterator)
    assert len(data_threads()) == 1
    loader.close()
    assert data_threads() == []
    with pytest.raises(RuntimeError, match="call iter"):
        next(iterator)

    forgotten = build_dataloader(dataset="toy", tokenizer=tokenizer, seq_len=8, local_batch_size=1)
    take(forgotten, 1)
    assert len(data_threads()) == 1
    del forgotten
    gc.collect()
    assert data_threads() == []


def test_the_thread_stays_within_its_bound(tokenizer, monkeypatch):
    read = []

    def endless(path, order):
        for i in itertools.count(order.start):
            read.append(i)
            yield Document(str(i), "x" * 300_000)  # a tokenizer batch of its own

    monkeypatch.setitem(DATASETS, "endless", DatasetRow("endless", endless, lambda path: None))
    tokens = len(tokenizer.encode("x" * 300_000)) + 2
    loader = build_dataloader(
        dataset="endless",
        tokenizer=tokenizer,
        seq_len=tokens,
        local_batch_size=1,
        prefetch_factor=2,
        num_workers=2,
    )
    take(loader, 3)
    threading.Event().wait(0.5)
    # Consumed, prefetched, one waiting for room, the document that a window's last token needs, and those
    # that the threads tokenize.
    assert len(read) <= 3 + 2 + 1 + 2 + 3
    loader.close()


def test_settings_are_checked(build_toy):
    for change, message in (
        ({"dataset": "toi"}, "did you mean 'toy'"),
        ({"seq_len": 0}, "seq_len = 0 must be at least 1"),
        ({"local_batch_size": 0}, "local_batch_size = 0"),
        ({"prefetch_factor": -1}, "prefetch_factor = -1"),
        ({"dp_rank": 2, "dp_degree": 2}, "dp_rank = 2 must be from 0 to"),
        ({"num_workers": -1}, "num_workers = -1"),
        ({"mixture": ["toy=1"], "infinite": False}, "a mixture has no end"),
    ):
        with pytest.raises(ValueError, match=message):
            build_toy(**change)


@pytest.mark.gpu
def test_pinned_batches(build_toy):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    batches = take(build_toy(pin_memory=True), 3)
    assert all(tensor.is_pinned() for batch in batches for tensor in batch[:3])
    for mine, expected in zip(batches, take(build_toy(), 3), strict=True):
        assert torch.equal(mine.tokens.to("cuda", non_blocking=True).cpu(), expected.tokens)


def test_shuffled_windows_are_a_permutation_and_resume_anywhere():
    windows = [Window((np.array([i, i + 1]),), StreamPosition(document=i + 1)) for i in range(20)]
    whole = list(shuffle_windows(iter(windows), ShuffledPosition(), seed=1, block_size=8))
    order = [int(window.pieces[0][0]) for window, _ in whole]
    assert [sorted(order[a:b]) for a, b in ((0, 8), (8, 16), (16, 20))] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    assert order != sorted(order)
    for done in (1, 8, 11, 19):
        place = whole[done - 1][1]
        rest = shuffle_windows(iter(windows[place.block.document :]), place, seed=1, block_size=8)
        assert [int(window.pieces[0][0]) for window, _ in rest] == order[done:]
