"""`octavo tokenize`, as a user runs it: the same bytes whatever happens on the way."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.commands.tokenize import tokenize
from trainer.data import records, tokenize_plan
from trainer.data.documents import DocumentOrder
from trainer.data.loader import build_dataloader
from trainer.data.local_files import read_local_files
from trainer.data.packing import IGNORED_LABEL
from trainer.data.paths import PROJECT_ROOT
from trainer.data.token_manifest import read_manifest

ASSET = str(PROJECT_ROOT / "tests/assets/tokenizer")
WORDS = [
    "lorem",
    "ipsum",
    "dolor",
    "sit",
    "amet,",
    "Grüße",
    "naïve",
    "東京",
    "🦙",
    "def",
    "f(x):",
    "return",
    "x\n\n",
    "",
    "\tfoo\r\nBar",
    "baz\n",
]


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder and its SHA-256."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))


def json_lines(source: random.Random, count: int) -> bytes:
    rows = ({"text": text(source, source.randrange(60)), "id": i} for i in range(count))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """Every kind of file, large for units of 8 KiB."""
    monkeypatch.setattr(tokenize_plan, "UNIT_BYTES", 1 << 13)
    source = random.Random(1)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(source, 120))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(source, 30), mtime=0))
    with pa.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as out:
        out.write(json_lines(source, 30))
    (folder / "d.txt").write_text(text(source, 4000), newline="")
    rows = pa.table({"text": [text(source, 40) for _ in range(60)]})
    pq.write_table(rows, folder / "e.parquet", row_group_size=20)
    for number in range(5):
        (folder / f"small-{number}.txt").write_text(text(source, 30), newline="")
    return folder


def stream(path: Path, dataset: str, tokenizer) -> list[int]:
    """The tokens of one pass."""
    loader = build_dataloader(
        dataset=dataset,
        dataset_path=str(path),
        tokenizer=tokenizer,
        seq_len=64,
        local_batch_size=1,
        infinite=False,
    )
    found: list[int] = []
    for batch in loader:
        found += batch.labels[batch.labels != IGNORED_LABEL].tolist()
    return found


def test_the_tokens_are_those_of_every_document(corpus, tmp_path, tokenizer):
    out = tokenize(str(corpus), str(tmp_path / "out"), workers=2, tokenizer=ASSET)
    manifest = read_manifest(str(out))
    assert len(manifest.shards) > 8
    assert any(shard.continues for shard in manifest.shards)  # d.txt is cut
    documents = [
        document.text for document in read_local_files(str(corpus), DocumentOrder()) if document.text
    ]
    assert manifest.documents == len(documents)
    expected = sorted(tuple(tokenizer.encode(text)) for text in documents)
    found: list[tuple[int, ...]] = []
    current: list[int] = [tokenizer.bos_id]
    tokens = stream(out, "token_files", tokenizer)
    for token in tokens:
        current.append(token)
        if token == tokenizer.eos_id:
            found.append(tuple(current[1:-1]))
            current = []
    assert sorted(found) == expected


def test_the_bytes_do_not_depend_on_the_workers_nor_on_where_they_lie(corpus, tmp_path):
    one = tokenize(str(corpus), str(tmp_path / "one"), workers=1, tokenizer=ASSET)
    three = tokenize(str(corpus), str(tmp_path / "three"), workers=3, tokenizer=ASSET)
    assert digest(one) == digest(three)


def test_killed_and_run_again(corpus, tmp_path, capsys):
    whole = digest(tokenize(str(corpus), str(tmp_path / "whole"), workers=1, tokenizer=ASSET))
    out = tmp_path / "out"
    code = (
        "from trainer.data import tokenize_plan; tokenize_plan.UNIT_BYTES = 1 << 13\n"
        "from trainer.commands.tokenize import tokenize\n"
        f"if __name__ == '__main__': tokenize({str(corpus)!r}, {str(out)!r}, workers=1, tokenizer={ASSET!r})"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not list((out / ".work").glob("unit-*.json")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    if not (out / ".work").exists():
        pytest.skip("it was done before it could be killed")
    (out / ".work" / "-shard-00099.1.tmp").write_bytes(b"what was being written")
    capsys.readouterr()
    deadline = time.monotonic() + 60
    while True:
        try:
            tokenize(str(corpus), str(out), workers=2, tokenizer=ASSET)
            break
        except ValueError as error:  # its worker notices within moments that its parent is gone
            if "another octavo tokenize" not in str(error) or time.monotonic() > deadline:
                raise
    assert "going on: " in capsys.readouterr().out
    assert digest(out) == whole
    assert "nothing to do" not in capsys.readouterr().out
    tokenize(str(corpus), str(out), workers=2, tokenizer=ASSET)
    assert "nothing to do" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    out = str(tmp_path / "out")
    tokenize(str(corpus / "a.jsonl"), out, workers=1, tokenizer=ASSET)
    before = digest(tmp_path / "out")
    with pytest.raises(ValueError, match="holds the tokens of another source"):
        tokenize(str(corpus / "d.txt"), out, workers=1, tokenizer=ASSET)
    assert digest(tmp_path / "out") == before
    with pytest.raises(ValueError, match="is not empty"):
        tokenize(str(corpus / "d.txt"), str(corpus), workers=1, tokenizer=ASSET)


def test_text_that_changed_is_not_taken_for_the_same(tmp_path):
    source, out = tmp_path / "a.txt", str(tmp_path / "out")
    source.write_text("one text of this size")
    tokenize(str(source), out, workers=1, tokenizer=ASSET)
    source.write_text("and other of that one")
    with pytest.raises(ValueError, match="holds the tokens of another source"):
        tokenize(str(source), out, workers=1, tokenizer=ASSET)


def test_a_refused_run_leaves_the_folder_to_the_next(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(BAD)
    arguments = (str(tmp_path / "bad.jsonl"), str(tmp_path / "out"), 1, ASSET)
    with pytest.raises(ValueError, match="no string field 'text'"):
        tokenize(*arguments)
    assert read_manifest(str(tokenize(*arguments, bad_data="skip"))).documents == 2


def test_validation_is_held_out_by_the_text(tmp_path, tokenizer, capsys):
    lines = [json.dumps({"body": f"document number {i % 200}"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = tokenize(
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "out"),
        workers=1,
        tokenizer=ASSET,
        text_field="body",
        validation_one_in=10,
    )
    train, held_out = read_manifest(str(out)), read_manifest(str(out / "validation"))
    assert train.documents + held_out.documents == 400
    assert 10 <= held_out.documents <= 80
    assert held_out.documents % 2 == 0  # a text and its copy stay together


BAD = b'{"text": "good one"}\n{"text": 5}\n{broken\n{"text": "\xff"}\n{"text": "good two"}\n'


def test_bad_lines_are_refused_or_counted(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_bytes(BAD)
    arguments = {"src": str(tmp_path / "bad.jsonl"), "out": str(tmp_path / "out"), "workers": 1}
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: no string field 'text'"):
        tokenize(**arguments, tokenizer=ASSET)
    assert not (tmp_path / "out" / "index.json").exists()
    out = tokenize(**{**arguments, "out": str(tmp_path / "skip")}, tokenizer=ASSET, bad_data="skip")
    printed = capsys.readouterr().out
    assert read_manifest(str(out)).documents == 2
    assert "3 documents or files could not be read" in printed
    assert "bad.jsonl, line 3: not valid JSON" in printed
    assert json.loads((out / "index.json").read_text())["totals"]["skipped"] == 3


def test_lines_are_named_alike_in_any_span(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_plan, "UNIT_BYTES", 64)
    good = b'{"text": "a line of some length"}\n'
    (tmp_path / "bad.jsonl").write_bytes(good * 20 + b"{broken\n" + good * 20)
    source = tokenize_plan.TextSource.parse(str(tmp_path / "bad.jsonl"), "text")
    units = tokenize_plan.plan_units(source, True)
    assert len(units) > 10
    messages, found = [], 0
    for unit in units:
        try:
            found += len(list(tokenize_plan.read_unit(source, unit, DocumentOrder())))
        except ValueError as error:
            messages.append(str(error).splitlines()[0])
    assert len(messages) == 1
    assert "bad.jsonl, line 21: not valid JSON" in messages[0]


def test_spans_hold_every_record_once(corpus, monkeypatch):
    monkeypatch.setattr(records, "PIECE_BYTES", 500)
    for unit_bytes in (100, 1000, 1 << 20):
        monkeypatch.setattr(tokenize_plan, "UNIT_BYTES", unit_bytes)
        for file in sorted(corpus.iterdir()):
            source = tokenize_plan.TextSource.parse(str(file), "text")
            request = DocumentOrder(pieces=True)
            documents = [
                document
                for unit in tokenize_plan.plan_units(source, True)
                for document in tokenize_plan.read_unit(source, unit, request)
            ]
            whole = [record() for record in records.read_records(file, DocumentOrder())]
            assert "".join(d.text for d in documents) == "".join(d.text for d in whole), file
            assert sum(d.opens for d in documents) == sum(d.closes for d in documents) == len(whole)


def test_options_are_checked(tmp_path):
    for change, message in (
        ({"workers": -1}, "workers = -1"),
        ({"bad_data": "ignore"}, "allowed: refuse, skip"),
        ({"validation_one_in": 1}, "allowed: 0"),
        ({"src": str(tmp_path / "absent")}, "no file matches"),
        ({"src": "token_files:x"}, "holds tokens and no text"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer at"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(**{"src": "python_sources", "out": str(tmp_path / "out"), "tokenizer": ASSET, **change})
