"""One process of ``octavo tokenize``: a unit of text in, a shard and a record of it out. Torch-free.

The tokenizer works in one thread here: processes are what runs in parallel. That thread does nothing else,
and the rest of the process waits for it. So the C library gives it a heap of its own, which is empty again
after each batch; on one heap with Python's objects the tokenizer's small blocks come to lie between those,
and it takes about a tenth longer. What a unit yields is a pure function of the unit, so a unit that was
interrupted is simply done again.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.documents import BadData, Document, DocumentOrder
from trainer.data.encode import batch_documents, encode_texts
from trainer.data.records import COMPRESSED_SUFFIXES
from trainer.data.token_writer import ShardWriter
from trainer.data.tokenize_plan import TextSource, Unit, read_unit
from trainer.data.tokenizer import Tokenizer, build_tokenizer

WORK = ".work"
VALIDATION = "validation"
_BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Job:
    """What all units have in common."""

    source: TextSource
    tokenizer: str
    out: str
    dtype: str
    skip_bad_data: bool
    validation_one_in: int


class StoppedError(Exception):
    """Another unit failed, or the user interrupted."""


class _Process:
    """What this process keeps between units."""

    job: Job
    tokenizer: Tokenizer
    encoder: ThreadPoolExecutor
    progress: Any
    stop: Any


def start_process(job: Job, progress: Any, stop: Any) -> None:
    """Prepare this process; it ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _Process.job, _Process.progress, _Process.stop = job, progress, stop
    _Process.tokenizer = build_tokenizer(job.tokenizer)
    _Process.encoder = ThreadPoolExecutor(1, thread_name_prefix="octavo-encoder")


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def record_file(out: str, unit: Unit) -> Path:
    """Where the record of a finished unit lies."""
    return Path(out) / WORK / f"unit-{unit.number:05d}.json"


def tokenize_unit(unit: Unit) -> dict[str, Any]:
    """Tokenize a unit; its record says what came of it, and is on disk when this returns.

    Raises:
        ValueError: Its text cannot be read.
        StoppedError: The whole is to stop.
    """
    job = _Process.job
    out, work = Path(job.out), Path(job.out) / WORK
    name = f"shard-{unit.number:05d}"
    bad_data = BadData(job.skip_bad_data)
    request = DocumentOrder(
        text_field=job.source.text_field, bad_data=bad_data, pieces=_Process.tokenizer.splits_at_lines
    )
    folders = {"": out, **({VALIDATION: out / VALIDATION} if job.validation_one_in else {})}
    writers = {part: ShardWriter(folder, name, job.dtype, work) for part, folder in folders.items()}
    counts = {"text_bytes": 0, "empty": 0, "longest": 0}
    try:
        for batch in batch_documents(read_unit(job.source, unit, request), _BATCH_DOCUMENTS):
            if _Process.stop.is_set():
                raise StoppedError
            before = counts["text_bytes"]
            _write_batch(batch, writers, counts, job.validation_one_in)
            _advance(unit, before, counts["text_bytes"])
        shards = {part: writer.finish() for part, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    with _Process.progress.get_lock():
        _Process.progress[0] += unit.size - min(unit.size, _weighed(unit, counts["text_bytes"]))
    record = {
        "shards": shards,
        "skipped": bad_data.skipped,
        "first_skipped": bad_data.first,
        **counts,
    }
    place = record_file(job.out, unit)
    scratch = place.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(record), encoding="utf-8")
    os.replace(scratch, place)
    return record


def _write_batch(
    batch: list[Document], writers: dict[str, ShardWriter], counts: dict[str, int], one_in: int
) -> None:
    texts = [document.text for document in batch]
    encoded = _Process.encoder.submit(encode_texts, _Process.tokenizer, texts).result()
    for document, ids in zip(batch, encoded, strict=True):
        counts["text_bytes"] += len(document.text.encode())
        counts["longest"] = max(counts["longest"], len(ids))
        if len(ids) == 0 and document.opens and document.closes:
            counts["empty"] += 1
            continue
        held_out = one_in and _is_held_out(document, one_in)
        writers[VALIDATION if held_out else ""].add(ids, document.opens)


def _is_held_out(document: Document, one_in: int) -> bool:
    """By a text itself, so that equal texts stay together; by its file's name where it comes in pieces."""
    whole = document.opens and document.closes
    return zlib.crc32((document.text if whole else document.name).encode()) % one_in == 0


def _advance(unit: Unit, before: int, after: int) -> None:
    """Add to the progress what a batch was of the unit: bytes of its source, and of text."""
    share = min(unit.size, _weighed(unit, after)) - min(unit.size, _weighed(unit, before))
    with _Process.progress.get_lock():
        _Process.progress[0] += share
        _Process.progress[1] += after - before


def _weighed(unit: Unit, text_bytes: int) -> int:
    compressed = any(file.endswith((*COMPRESSED_SUFFIXES, ".parquet")) for file in unit.files)
    return text_bytes // 3 if compressed and unit.span is None else text_bytes
