from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import records
from trainer.data.datasets import check_dataset, dataset_row
from trainer.data.documents import BadData, DocumentOrder
from trainer.data.identity import identify_files
from trainer.data.local_files import SHUFFLE_BLOCK_RECORDS, list_files, read_local_files


def read(path, **order) -> list[tuple[str, str]]:
    return [document[:2] for document in read_local_files(str(path), DocumentOrder(**order))]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.fixture
def every_kind(tmp_path):
    """A folder with each kind of file, a nested folder, a hidden file and one that is no data."""
    (tmp_path / "a.txt").write_bytes("\ufeffplain\r\ntext 漢字".encode())
    (tmp_path / "b.jsonl").write_bytes(lines("line\u2028one", "two") + b"\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(lines("zipped 🦙")))
    (tmp_path / "sub" / "d.json").write_bytes(lines("json"))
    pq.write_table(pa.table({"id": [1, 2], "text": ["row one", "row two"]}), tmp_path / "e.parquet")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("readme")
    return tmp_path


ALL = {
    ("a.txt", "plain\r\ntext 漢字"),
    ("b.jsonl:1", "line\u2028one"),
    ("b.jsonl:2", "two"),
    ("c.jsonl.gz:1", "zipped 🦙"),
    ("d.json:1", "json"),
    ("e.parquet:1", "row one"),
    ("e.parquet:2", "row two"),
}


def test_every_kind_of_file_in_a_folder(every_kind):
    found = read(every_kind)
    assert set(found) == ALL
    assert len(found) == len(ALL)
    again = dataset_row("text_files").documents(str(every_kind), DocumentOrder())
    assert [document[:2] for document in again] == found


def test_one_file_or_a_glob(every_kind):
    assert {name for name, _ in read(every_kind / "b.jsonl")} == {"b.jsonl:1", "b.jsonl:2"}
    found = {name for name, _ in read(every_kind / "**" / "*.json*")}
    assert found == {"b.jsonl:1", "b.jsonl:2", "c.jsonl.gz:1", "d.json:1"}


def test_the_order_does_not_depend_on_where_the_folder_lies(every_kind, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("other") / "moved"
    found = read(every_kind, seed=4)
    every_kind.rename(elsewhere)
    assert read(elsewhere, seed=4) == found


def test_orders_differ_by_epoch_and_start_cuts_them(tmp_path):
    count = 2 * SHUFFLE_BLOCK_RECORDS + 10
    (tmp_path / "many.jsonl").write_bytes(lines(*map(str, range(count))))
    first = read(tmp_path, seed=1)
    assert [int(text) for _, text in first] != list(range(count))
    assert sorted(int(text) for _, text in first) == list(range(count))
    assert read(tmp_path, seed=1, epoch=1) != first
    assert read(tmp_path, seed=1, start=1500) == first[1500:]


def test_records_before_the_start_are_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "many.jsonl").write_bytes(lines(*map(str, range(100))))
    parsed = []
    monkeypatch.setattr(records.json, "loads", lambda text: parsed.append(text) or {"text": text})
    assert len(read(tmp_path, start=90)) == 10
    assert len(parsed) == 10


def test_a_path_from_the_checkout_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list_files("./tests/assets/tokenizer/*config.json")[0].name == "tokenizer_config.json"


BAD = {
    "utf8.txt": (b"fine\nfine\n\xff", r"utf8\.txt, line 3: not valid UTF-8\n  got the byte 0xff"),
    "utf8.jsonl": (lines("ok") + b'{"text": "\xe9"}\n', r"utf8\.jsonl, line 2: not valid UTF-8"),
    "bad.jsonl": (lines("ok", "ok") + b'{"text": \n', r"bad\.jsonl, line 3: not valid JSON"),
    "missing.jsonl": (
        b'{"content": "x"}\n',
        r"missing\.jsonl, line 1: no string field 'text'\n  got: content",
    ),
    "null.jsonl": (b'{"text": null}\n', r"null\.jsonl, line 1: no string field 'text'"),
    "list.json": (b"[1, 2]\n", r"list\.json, line 1: no string field 'text'\n  got: list"),
    "half.jsonl": (b'{"text": "\\ud83e"}\n', r"half\.jsonl, line 1: half a surrogate pair"),
    "cut.jsonl.gz": (gzip.compress(lines("ok") * 99)[:-12], r"cut\.jsonl\.gz: damaged gzip file"),
    "plain.jsonl.gz": (lines("ok"), r"plain\.jsonl\.gz: damaged gzip file"),
    "emptied.jsonl.gz": (b"", r"emptied\.jsonl\.gz: damaged gzip file"),
    "emptied.jsonl.zst": (b"", r"emptied\.jsonl\.zst: damaged Zstandard file"),
    "bad.parquet": (b"PAR1 is not enough", r"bad\.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_file_and_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_cannot_be_read_is_refused_or_skipped(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # opens, and fails to read: no permission helps
    with pytest.raises(ValueError, match=rf"{name}: (cannot be read|not a readable|damaged)") as caught:
        read(tmp_path)
    assert str(caught.value).count("\n") <= 2
    with pytest.raises(ValueError, match=r"cannot be read\n  got: Input/output error"):
        identify_files([tmp_path / name])
    (tmp_path / "good.txt").write_text("one text")
    skipping = BadData(skip=True)
    found = read_local_files(str(tmp_path), DocumentOrder(bad_data=skipping))
    assert [document.text for document in found if document.text] == ["one text"]
    assert skipping.skipped == 1
    assert identify_files([tmp_path / name], skip_unreadable=True)["files"] == 1


def test_parquet_without_text(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'\n  got the columns: body, id"):
        read(tmp_path)
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: column 'text' is not a string"):
        read(tmp_path)


def test_paths_that_match_nothing(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    for path in (tmp_path, tmp_path / "notes.md", tmp_path / "*.md"):
        with pytest.raises(ValueError, match="no data file matches"):
            check_dataset("text_files", str(path))
    for path in (tmp_path / "absent", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match="no file matches"):
            check_dataset("c4_test", str(path))
    with pytest.raises(ValueError, match=r"needs training\.dataset_path"):
        check_dataset("text_files")
