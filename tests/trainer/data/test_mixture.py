"""Mixtures: the shares, the order, and resuming each source where it was."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from trainer.data.loader import build_dataloader
from trainer.data.mixture import BLOCK, PERIOD, Schedule, parse_mixture


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Blocks of a few windows: less to tokenize for each loader."""
    monkeypatch.setattr("trainer.data.shuffle.BLOCK_TOKENS", 512)


def test_entries_are_read():
    entries = parse_mixture(
        ["c4=0.5", "text_files:/data/lang=en/*.jsonl#content=0.25", "hugging_face:org/name:sub@train=2e-1"]
    )
    assert [(e.dataset, e.path, e.text_field, e.weight) for e in entries] == [
        ("c4", None, None, 0.5),
        ("text_files", "/data/lang=en/*.jsonl", "content", 0.25),
        ("hugging_face", "org/name:sub@train", None, 0.2),
    ]


@pytest.mark.parametrize("text", ["c4", "c4=", "c4=x", "=1", "c4=0", "c4=-1", "c4=nan", "c4=inf", ""])
def test_what_is_no_entry(text):
    with pytest.raises(ValueError, match="allowed: NAME") as caught:
        parse_mixture([text])
    assert str(caught.value).count("\n") <= 2


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1/4096"):
        parse_mixture(["c4=1", "python_sources=1e-5"])


@pytest.mark.parametrize(
    "weights", [[1.0], [3, 1], [0.5, 0.3, 0.2], [1, 1000], [1 / 3] * 3, list(range(1, 20))]
)
def test_shares_hold_everywhere(weights):
    schedule = Schedule(weights, seed=5)
    drawn = [schedule.source(n) for n in range(2 * PERIOD)]
    total = sum(weights)
    for end in (BLOCK, 10 * BLOCK, 1000, PERIOD, 2 * PERIOD):
        counts = Counter(drawn[:end])
        for source, weight in enumerate(weights):
            # Within a block the order is random, so a part of one may be off by as much.
            slack = 1.5 + end / PERIOD + (BLOCK * weight / total if end % BLOCK else 0)
            assert abs(counts[source] - end * weight / total) <= slack


def test_the_schedule_is_a_function_of_seed_and_place():
    one, other = Schedule([3, 1], 1), Schedule([3, 1], 2)
    drawn = [one.source(n) for n in range(500)]
    assert [one.source(n) for n in reversed(range(500))] == drawn[::-1]
    assert [Schedule([3, 1], 1).source(n) for n in range(0, 500, 40)] == drawn[::40]
    assert [other.source(n) for n in range(500)] != drawn
    assert len(set(map(tuple, zip(*[iter(drawn)] * 4, strict=False)))) > 4  # not one pattern for ever


@pytest.fixture
def entries(tmp_path):
    """Two sets whose documents say which they are of, in fields of their own."""
    for name, field, letter in (("a", "text", "A"), ("b", "content", "B")):
        rows = (json.dumps({field: f"{letter} {i} " * 20}) + "\n" for i in range(300))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return [f"text_files:{tmp_path}/a.jsonl=3", f"text_files:{tmp_path}/b.jsonl#content=1"]


def build(entries, tokenizer, **changes):
    settings = {"mixture": entries, "tokenizer": tokenizer, "seq_len": 16, "local_batch_size": 2, "seed": 3}
    return build_dataloader(**{**settings, **changes})


def windows(loaders, count: int) -> np.ndarray:
    per_rank = [list(itertools.islice(iter(loader), count)) for loader in loaders]
    for loader in loaders:
        loader.close()  # keeps its place
    return np.concatenate([batch.tokens.numpy() for group in zip(*per_rank, strict=True) for batch in group])


def test_windows_come_by_weight_from_each_source_alone(entries, tokenizer):
    rows = windows([build(entries, tokenizer)], 256)
    texts = [tokenizer.decode(row.tolist()) for row in rows]
    assert not any("A" in text and "B" in text for text in texts)
    assert abs(sum("B" in text for text in texts) - 128) <= 2


@pytest.mark.parametrize(("consumed", "R"), [(1, 1), (5, 2), (33, 4)])
def test_resume_on_another_number_of_ranks(entries, tokenizer, consumed, R):
    whole = windows([build(entries, tokenizer)], 80)
    loader = build(entries, tokenizer)
    windows([loader], consumed)
    state = json.loads(json.dumps(loader.state_dict()))
    loaders = [build(entries, tokenizer, dp_rank=r, dp_degree=R) for r in range(R)]
    for other in loaders:
        other.load_state_dict(state)
    resumed = windows(loaders, 10)
    np.testing.assert_array_equal(resumed, whole[2 * consumed :][: len(resumed)])


def test_weights_may_change_at_resume_and_sources_may_not(entries, tokenizer):
    loader = build(entries, tokenizer)
    windows([loader], BLOCK // 2)
    state = loader.state_dict()
    other = build([entries[0], entries[1].replace("=1", "=3")], tokenizer)
    other.load_state_dict(state)
    texts = [tokenizer.decode(row.tolist()) for row in windows([other], 128)]
    assert abs(sum("B" in text for text in texts) - 128) <= 2
    with pytest.raises(ValueError, match="saved with datasets = "):
        build(entries[:1], tokenizer).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the data changed since the checkpoint: text_files:.*b\.jsonl"):
        build(entries[::-1], tokenizer).load_state_dict(state)
