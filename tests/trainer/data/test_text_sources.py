"""Text as a source: resuming at a part, long texts in pieces, bad data, and data that changed."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import local_files, records
from trainer.data.datasets import DATASETS
from trainer.data.documents import BadData, DocumentOrder
from trainer.data.loader import build_dataloader
from trainer.data.local_files import read_local_files


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Blocks of a few windows: less to tokenize for each loader."""
    monkeypatch.setattr("trainer.data.shuffle.BLOCK_TOKENS", 512)


@pytest.fixture
def corpus(tmp_path):
    """Five files of three kinds, 60 documents each, and two long texts."""
    for name in "ab":
        rows = (json.dumps({"text": f"{name} {i} " * 9, "other": f"o{i}"}) + "\n" for i in range(60))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    rows = (json.dumps({"text": f"c {i} " * 9}) + "\n" for i in range(60))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    with pa.CompressedOutputStream(str(tmp_path / "d.jsonl.zst"), "zstd") as out:
        out.write("".join(json.dumps({"text": f"d {i} " * 9}) + "\n" for i in range(60)).encode())
    table = pa.table({"text": [f"e {i} " * 9 for i in range(60)]})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=7)
    for name in "fg":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i}\n" for i in range(400)))
    return tmp_path


@pytest.mark.parametrize("pieces", [False, True])
def test_any_part_and_start_is_the_rest_of_the_order(corpus, monkeypatch, pieces):
    monkeypatch.setattr(local_files, "SHUFFLE_BLOCK_RECORDS", 16)
    monkeypatch.setattr(records, "PIECE_BYTES", 700)
    order = DocumentOrder(seed=4, epoch=1, pieces=pieces)
    whole = list(read_local_files(str(corpus), order))
    assert {document.part for document in whole} == set(range(7))
    for part in range(7):
        own = [i for i, document in enumerate(whole) if document.part == part]
        for start in (0, 1, 16, 33, len(own) - 1):
            if start < len(own):
                rest = list(read_local_files(str(corpus), order._replace(part=part, start=start)))
                assert rest == whole[own[start] :], (part, start)


def test_files_before_the_part_are_not_opened(corpus, monkeypatch):
    opened = []
    read = local_files.read_records
    monkeypatch.setattr(
        local_files, "read_records", lambda file, *a: opened.append(file.name) or read(file, *a)
    )
    list(read_local_files(str(corpus), DocumentOrder(part=5)))
    assert len(opened) == 2


def take(loader, count):
    rows = np.concatenate([batch.tokens.numpy() for batch in itertools.islice(iter(loader), count)])
    loader.close()
    return rows


@pytest.mark.parametrize("consumed", [3, 20, 45])
def test_resume_in_files_of_every_kind(corpus, tokenizer, monkeypatch, consumed):
    monkeypatch.setattr(records, "PIECE_BYTES", 700)
    monkeypatch.setattr("trainer.data.shuffle.BLOCK_TOKENS", 512)
    settings = {"dataset": "text_files", "dataset_path": str(corpus), "tokenizer": tokenizer, "seq_len": 64}
    build = lambda: build_dataloader(**settings, local_batch_size=4, seed=1, num_workers=2)  # noqa: E731
    whole = take(build(), 90)
    loader = build()
    take(loader, consumed)
    resumed = build()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    np.testing.assert_array_equal(take(resumed, 20), whole[4 * consumed :][:80])


def test_the_threads_change_nothing(corpus, tokenizer):
    settings = {"dataset": "text_files", "dataset_path": str(corpus), "tokenizer": tokenizer, "seq_len": 64}
    rows = [
        take(build_dataloader(**settings, local_batch_size=4, num_workers=threads), 60)
        for threads in (1, 2, 5)
    ]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


def test_a_text_in_pieces_is_one_document(tmp_path, tokenizer, monkeypatch):
    text = "".join(f"Line {i} of it\n  indented\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    settings = {
        "dataset": "text_files",
        "dataset_path": str(tmp_path),
        "tokenizer": tokenizer,
        "infinite": False,
    }
    whole, pieces = [], []
    for size, found in ((1 << 20, whole), (100, pieces)):
        monkeypatch.setattr(records, "PIECE_BYTES", size)
        for batch in build_dataloader(**settings, seq_len=128, local_batch_size=1):
            found.append([array.tolist() for array in batch[:3]])
    assert pieces == whole
    assert whole[0][0][0][1:] == tokenizer.encode(text)[:127]


def test_the_text_field_is_the_users(corpus, tokenizer):
    found = read_local_files(str(corpus / "a.jsonl"), DocumentOrder(text_field="other"))
    assert {document.text for document in found} == {f"o{i}" for i in range(60)}
    table = pa.table({"body": ["one", "two"], "text": [1, 2]})
    pq.write_table(table, corpus / "e.parquet")
    found = read_local_files(str(corpus / "e.parquet"), DocumentOrder(text_field="body"))
    assert {document.text for document in found} == {"one", "two"}


BAD = {
    "bad.jsonl": (b'{"text": "ok"}\n{no\n{"text": 7}\n{"text": "\xff"}\n{"text": "\\ud800"}\n[1]\n', 5),
    "deep.jsonl": (b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n", 1),
    "digits.jsonl": (b'{"text": "ok"}\n{"text": ' + b"9" * 5000 + b"}\n", 1),
    "bad.txt": (b"fine\n\xfe\n", 1),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "ok"}\n' * 3000)[:-20], 1),
    "cut.jsonl.zst": (pa.compress(b'{"text": "ok"}\n' * 3000, "zstd", asbytes=True)[:-20], 1),
    "no.jsonl.zst": (b"nothing of the kind", 1),
    "bad.parquet": (b"PAR1 and nothing more", 1),
    "empty.parquet": (b"", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_or_counted(tmp_path, name, caplog):
    content, count = BAD[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        list(read_local_files(str(tmp_path), DocumentOrder()))
    assert str(caught.value).count("\n") <= 2
    skip = BadData(skip=True)
    texts = [document.text for document in read_local_files(str(tmp_path), DocumentOrder(bad_data=skip))]
    assert "good" in texts
    assert skip.skipped == count
    assert caplog.text.count("bad data left out: ") == count
    assert name in caplog.text


def test_skipped_records_keep_their_place(tmp_path, tokenizer):
    lines = [json.dumps({"text": f"document {i} " * 5}) if i % 3 else "{broken" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = {"dataset": "text_files", "dataset_path": str(tmp_path), "tokenizer": tokenizer, "seq_len": 32}
    build = lambda: build_dataloader(**settings, local_batch_size=2, bad_data="skip")  # noqa: E731
    whole, loader = take(build(), 60), build()
    take(loader, 17)
    assert loader.skipped > 0
    resumed = build()
    resumed.load_state_dict(loader.state_dict())
    np.testing.assert_array_equal(take(resumed, 20), whole[34:74])


def spoil(corpus, change):
    file = corpus / "b.jsonl"
    if change == "gone":
        file.unlink()
    elif change == "was not there":
        (corpus / "new.jsonl").write_text('{"text": "new"}\n')
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1  # of the same size
        file.write_bytes(data)


@pytest.mark.parametrize("change", ["is gone", "was not there", "has another content"])
def test_changed_files_are_noticed_at_resume(corpus, tokenizer, change):
    build = lambda: build_dataloader(  # noqa: E731
        dataset="text_files", dataset_path=str(corpus), tokenizer=tokenizer, seq_len=16, local_batch_size=1
    )
    state = build().state_dict()
    build().load_state_dict(state)
    spoil(corpus, change.removeprefix("is "))
    name = "new" if change == "was not there" else "b"
    message = rf"the data changed since the checkpoint: text_files:.*\n  got: {name}\.jsonl {change}"
    with pytest.raises(ValueError, match=message):
        build().load_state_dict(state)


def test_large_files_are_sampled(tmp_path, monkeypatch):
    from trainer.data import identity

    monkeypatch.setattr(identity, "HASHED_BYTES", 1 << 16)
    file = tmp_path / "a.jsonl"
    file.write_bytes(bytes(1 << 20))
    before = identity.identify_files([file])
    assert identity.identify_files([file]) == before
    file.write_bytes(bytes((1 << 20) - 1) + b"x")  # the end is always read
    assert identity.what_changed(before, identity.identify_files([file])) == "a.jsonl has another content"


datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")


@pytest.fixture
def hub_folder(tmp_path):
    """A dataset of three Parquet files, as the hub stores them, and the same saved to disk."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for shard in range(3):
        rows = pa.table({"content": [f"shard {shard} row {i}" for i in range(50)], "id": list(range(50))})
        pq.write_table(rows, folder / f"train-0000{shard}-of-00003.parquet")
    datasets.Dataset.from_dict({"content": [f"saved {i}" for i in range(70)]}).save_to_disk(
        tmp_path / "saved"
    )
    return tmp_path


@pytest.mark.parametrize("name", ["hub", "saved"])
def test_hugging_face_datasets(hub_folder, monkeypatch, name):
    monkeypatch.setattr("trainer.data.hugging_face.SHUFFLE_BLOCK_RECORDS", 16)
    monkeypatch.setattr(local_files, "SHUFFLE_BLOCK_RECORDS", 16)
    path = str(hub_folder / name)
    order = DocumentOrder(seed=2, text_field="content")
    whole = list(DATASETS["hugging_face"].documents(path, order))
    parts, count = (3, 50) if name == "hub" else (1, 70)
    expected = {f"shard {s} row {i}" for s in range(3) for i in range(50)}
    expected = expected if name == "hub" else {f"saved {i}" for i in range(70)}
    assert {document.text for document in whole} == expected
    assert len(whole) == len(expected)
    for part in range(parts):
        for start in (0, 1, 20, 49):
            rest = DATASETS["hugging_face"].documents(path, order._replace(part=part, start=start))
            assert list(rest) == whole[part * count + start :]
    other = [d.text for d in DATASETS["hugging_face"].documents(path, order._replace(epoch=1))]
    assert other != [document.text for document in whole]
    assert set(other) == expected


def test_hugging_face_datasets_train_and_resume(hub_folder, tokenizer):
    settings = {"dataset": "hugging_face", "dataset_path": f"{hub_folder}/hub", "text_field": "content"}
    build = lambda: build_dataloader(**settings, tokenizer=tokenizer, seq_len=16, local_batch_size=2)  # noqa: E731
    whole, loader = take(build(), 40), build()
    take(loader, 25)
    resumed = build()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    np.testing.assert_array_equal(take(resumed, 10), whole[50:70])


def test_hugging_face_datasets_that_cannot_be_had(hub_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path, message in (
        (f"{hub_folder}/hub@test", "cannot be opened"),
        (f"{hub_folder}/absent", "cannot be opened"),
        ("", "names no dataset"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            list(DATASETS["hugging_face"].documents(path, DocumentOrder()))
        assert str(caught.value).count("\n") <= 2
    with pytest.raises(ValueError, match=r"no string field 'text'\n  got: content \(str\), id \(int\)"):
        list(DATASETS["hugging_face"].documents(f"{hub_folder}/hub", DocumentOrder()))


def test_hugging_face_datasets_are_tokenized_shard_by_shard(hub_folder):
    from trainer.data.tokenize_plan import TextSource, plan_units, read_unit

    source = TextSource.parse(f"hugging_face:{hub_folder}/hub", "content")
    units = plan_units(source, True)
    request = DocumentOrder(text_field="content")
    texts = [[document.text for document in read_unit(source, unit, request)] for unit in units]
    assert texts == [[f"shard {s} row {i}" for i in range(50)] for s in range(3)]
