"""Token files: what is read back, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from trainer.data.loader import build_dataloader
from trainer.data.packing import IGNORED_LABEL
from trainer.data.permutation import Permutation
from trainer.data.token_files import verify_token_files
from trainer.data.token_manifest import read_manifest
from trainer.data.token_writer import ShardWriter

S, B = 16, 2


def write_tokens(folder: Path, shards: list[list[tuple[list[int], bool]]], tokenizer) -> Path:
    """Shards of (ids, opens) as `octavo tokenize` writes them, by its own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, documents in enumerate(shards):
        writer = ShardWriter(folder, f"shard-{number:05d}", "uint16", folder)
        for ids, opens in documents:
            writer.add(np.array(ids), opens)
        rows.append(writer.finish())
    index = {
        "format": "octavo-tokens",
        "version": 1,
        "dtype": "uint16",
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "shards": rows,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """61 documents of 1 to 40 ids."""
    source = random.Random(3)
    return [[source.randrange(2, 2048) for _ in range(source.randrange(1, 41))] for _ in range(61)]


@pytest.fixture
def tokens(tmp_path, tokenizer, documents) -> Path:
    """The documents in three shards; the 30th is cut between the second and the third."""
    cut = documents[30]
    shards = [
        [(ids, True) for ids in documents[:11]],
        [(ids, True) for ids in documents[11:30]] + [(cut[:7], True)],
        [(cut[7:], False)] + [(ids, True) for ids in documents[31:]],
    ]
    return write_tokens(tmp_path / "tokens", shards, tokenizer)


def build(path: Path, tokenizer, **changes):
    settings = {"dataset": "token_files", "dataset_path": str(path), "tokenizer": tokenizer, "seed": 3}
    return build_dataloader(**{**settings, "seq_len": S, "local_batch_size": B, **changes})


def take(loader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def in_global_order(per_rank: list[list], field: str = "tokens") -> np.ndarray:
    return np.concatenate([getattr(b, field).numpy() for group in zip(*per_rank, strict=True) for b in group])


def stream_of(documents, bos, eos) -> list[int]:
    return [token for ids in documents for token in [*bos, *ids, *eos]]


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_a_permutation_holds_every_element_once(size):
    order = Permutation(size, 1, 0)
    assert sorted(order[i] for i in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


def test_permutations_are_stable_and_differ_by_key():
    # Written down: another order under the same seed would silently change every resumed run.
    assert [Permutation(10, "windows", 1, 0)[i] for i in range(10)] == [0, 1, 9, 8, 4, 3, 5, 6, 7, 2]
    first, other = ([Permutation(1000, key)[i] for i in range(1000)] for key in (1, 2))
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 20
    assert abs(np.corrcoef(first, range(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_a_pass_in_order_is_the_stream(tokens, tokenizer, documents, add_bos, add_eos):
    bos = [tokenizer.bos_id] if add_bos else []
    eos = [tokenizer.eos_id] if add_eos else []
    stream = stream_of(documents, bos, eos)
    batches = list(build(tokens, tokenizer, infinite=False, add_bos=add_bos, add_eos=add_eos))
    labels = in_global_order([batches], "labels").ravel()
    inputs = in_global_order([batches]).ravel()
    assert labels[labels != IGNORED_LABEL].tolist() == stream[1:]
    assert inputs[labels != IGNORED_LABEL].tolist() == stream[:-1]
    # Ids of documents change where a document begins, also where it was cut between shards.
    owner = np.repeat(range(len(documents)), [len(ids) + len(bos) + len(eos) for ids in documents])
    ids = in_global_order([batches], "document_ids")
    for row, window in enumerate(owner[i : i + S] for i in range(0, len(stream) - 1, S)):
        assert (ids[row, : len(window)] == window - window[0]).all() or row == (len(stream) - 1) // S


def test_an_epoch_is_a_permutation_of_all_windows(tokens, tokenizer, documents):
    stream = np.array(stream_of(documents, [0], [1]))
    count = -(-(len(stream) - 1) // S)
    batches = take(build(tokens, tokenizer, local_batch_size=1), 2 * count)
    windows = [tuple(batch.labels[0].tolist()) for batch in batches]
    padded = np.pad(stream[1:], (0, count * S - len(stream) + 1), constant_values=IGNORED_LABEL)
    expected = sorted(map(tuple, padded.reshape(count, S).tolist()))
    assert sorted(windows[:count]) == expected == sorted(windows[count:])
    assert windows[:count] != windows[count:]
    assert sum(batch.label_count for batch in batches) == 2 * (len(stream) - 1)


@pytest.mark.parametrize("R", [2, 4])
@pytest.mark.parametrize("consumed", [0, 7, 23])
def test_resume_is_exact_on_another_number_of_ranks(tokens, tokenizer, R, consumed):
    whole = in_global_order([take(build(tokens, tokenizer), 120)])
    loader = build(tokens, tokenizer)
    take(loader, consumed)
    state = json.loads(json.dumps(loader.state_dict()))
    loaders = [build(tokens, tokenizer, dp_rank=r, dp_degree=R, local_batch_size=3) for r in range(R)]
    for other in loaders:
        other.load_state_dict(state)
    resumed = in_global_order([take(other, 9) for other in loaders])
    np.testing.assert_array_equal(resumed, whole[consumed * B :][: len(resumed)])


def test_resuming_reads_nothing_before_its_place(tokens, tokenizer, monkeypatch):
    loader = build(tokens, tokenizer)
    state = loader.state_dict()
    state["sources"][0].update(window=10**12, epoch=0)
    loader.load_state_dict(state)
    batch = take(loader, 1)[0]  # a place that no reading through could reach
    assert batch.tokens.shape == (B, S)


def test_epochs_are_counted_and_logged(tokens, tokenizer, caplog):
    loader = build(tokens, tokenizer, local_batch_size=40)
    with caplog.at_level("INFO"):
        take(loader, 3)
    assert loader.epoch == 1
    assert f"epoch 2 of token_files:{tokens} begins" in caplog.text


def test_another_length_goes_on_after_as_many_tokens(tokens, tokenizer, documents):
    loader = build(tokens, tokenizer, local_batch_size=1)
    take(loader, 20)
    longer = build(tokens, tokenizer, seq_len=32)
    longer.load_state_dict(loader.state_dict())
    assert longer.state_dict()["sources"][0]["window"] == 10


def test_padding_that_is_cut_short_is_refused_and_named(tokens, tokenizer):
    file = tokens / "shard-00001.bin"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"shard-00001\.bin: has \d+ bytes, index\.json says \d+"):
        build(tokens, tokenizer)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.bin: missing"):
        build(tokens, tokenizer)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("check", [lambda path, tokenizer: verify_token_files(str(path)), build])
def test_a_changed_byte_is_noticed(tokens, tokenizer, suffix, check):
    file = tokens / f"shard-00002{suffix}"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"shard-00002\{suffix}: changed since it was written") as caught:
        check(tokens, tokenizer)
    assert str(caught.value).count("\n") <= 2


def test_of_large_sets_every_block_is_verified_when_it_is_read(tokens, tokenizer, monkeypatch):
    monkeypatch.setattr("trainer.data.token_files._VERIFIED_WHOLE_BYTES", 0)
    file = tokens / "shard-00000.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"shard-00000\.bin: changed .*\n  at tokens 0 to \d+"):
        list(build(tokens, tokenizer, infinite=False))


def test_other_data_is_noticed_at_resume(tokens, tokenizer, tmp_path):
    state = build(tokens, tokenizer).state_dict()
    other = write_tokens(tmp_path / "other", [[([5, 6, 7], True)]], tokenizer)
    with pytest.raises(ValueError, match=r"the data changed since the checkpoint: token_files:.*other"):
        build(other, tokenizer).load_state_dict(state)


def test_ids_outside_the_vocabulary_are_refused(tmp_path, tokenizer):
    bad = write_tokens(tmp_path / "a", [[([5, 2048, 7], True)]], tokenizer)
    with pytest.raises(ValueError, match="shard-00000 has the id 2048, the vocabulary ends at 2047"):
        build(bad, tokenizer)
    index = json.loads((bad / "index.json").read_text())
    index["shards"][0]["largest_id"] = 7  # an index that does not tell
    (bad / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard-00000\.bin, token 1: id 2048 is outside"):
        build(bad, tokenizer)


def test_another_tokenizer_is_refused(tokens, tokenizer):
    index = json.loads((tokens / "index.json").read_text())
    index["tokenizer"]["fingerprint"] = "0" * 16
    (tokens / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="was written with another tokenizer"):
        build(tokens, tokenizer)


def change(key, value):
    def apply(index):
        index["shards"][1][key] = value

    return apply


HOSTILE = {
    "a path for a name": change("name", "../shard-00001"),
    "an absolute path": change("name", "/etc/passwd"),
    "a name twice": change("name", "shard-00000"),
    "a dtype of objects": lambda index: index.update(dtype="object"),
    "a dtype with fields": lambda index: index.update(dtype=[["a", "O"]]),
    "a dtype that is wider": lambda index: index.update(dtype="uint32"),
    "another version": lambda index: index.update(version=2),
    "a negative count": change("tokens", -1),
    "a count beyond all": change("tokens", 10**30),
    "a count that is text": change("tokens", "12"),
    "a count that is true": change("documents", True),
    "no documents": change("documents", 0),
    "too many documents": change("documents", 10**9),
    "no checksum": change("bin_sha256", None),
    "no shards": lambda index: index.update(shards=[]),
    "a shard that is no table": lambda index: index.update(shards=["shard-00000"]),
    "no tokenizer": lambda index: index.pop("tokenizer"),
    "a vocabulary of nothing": lambda index: index["tokenizer"].update(vocab_size=0),
    "a beginning before the first": lambda index: index["shards"][0].update(continues=True),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices_are_refused(tokens, name):
    index = json.loads((tokens / "index.json").read_text())
    HOSTILE[name](index)
    (tokens / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json|shard-0000") as caught:
        read_manifest(str(tokens))
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", '{"format": "octavo-tokens"', "\x80"])
def test_an_index_that_is_no_index(tokens, text):
    (tokens / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json: cannot be used as an index"):
        read_manifest(str(tokens))


def test_offsets_that_go_astray_are_refused(tokens, tokenizer):
    """Offsets and their checksum both forged: no read outside the shard comes of it."""
    file, index_file = tokens / "shard-00000.idx", tokens / "index.json"
    for forged in (1 << 62, 3):
        data = bytearray(file.read_bytes())
        data[8 * 5 : 8 * 6] = forged.to_bytes(8, "little")
        file.write_bytes(data)
        index = json.loads(index_file.read_text())
        index["shards"][0]["idx_sha256"] = hashlib.sha256(data).hexdigest()
        index_file.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"shard-00000\.idx: its offsets do not lead"):
            list(build(tokens, tokenizer, infinite=False))
