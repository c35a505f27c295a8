"""Documents from local files: ``.txt``, JSON lines (also gzipped) and Parquet.

What a path may be: one file, a folder (searched recursively; hidden files and other suffixes are left
out), or a glob (``data/**/*.jsonl.gz``). What is a document: a whole ``.txt`` file, one line of JSON
lines (field ``text``), one row of a Parquet file (column ``text``).

Order: the files are sorted by path, then shuffled by (seed, epoch); within a file, records are shuffled
in blocks of `SHUFFLE_BLOCK_RECORDS`. A block is all that is held in memory, so a first document comes
quickly from a file of any size; the price is that documents far apart in one file never trade places.
Records are parsed only when they are yielded: skipping to the start of a resumed run parses nothing.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from trainer.data.documents import Document, DocumentOrder
from trainer.data.paths import candidate_paths, describe_candidates

SHUFFLE_BLOCK_RECORDS = 1024
TEXT_FIELD = "text"
NEWLINE = b"\n"
JSON_LINES_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (".txt", *JSON_LINES_SUFFIXES, ".parquet")


Record = Callable[[], Document]
"""A document that is not parsed yet."""


def list_files(path: str) -> list[Path]:
    """The data files that ``path`` stands for, sorted.

    Raises:
        ValueError: Nothing is there, or nothing that can be read as documents.
    """
    for place in candidate_paths(path):
        if place.is_file():
            found = [place]
        elif place.is_dir():
            found = [file for file in place.rglob("*") if not _is_hidden(file.relative_to(place))]
        else:
            found = [Path(match) for match in glob.glob(str(place), recursive=True)]
        files = sorted(file for file in found if file.name.endswith(SUFFIXES) and file.is_file())
        if files:
            return files
        if found or place.exists():
            raise ValueError(
                f"training.dataset_path = {path!r}: no data file matches\n"
                f"  looked at: {place.absolute()}\n"
                f"  files that can be read end in: {', '.join(SUFFIXES)}"
            )
    raise ValueError(
        f"training.dataset_path = {path!r}: no file matches\n"
        f"  looked at: {describe_candidates(path)}\n"
        f"  give a file, a folder or a glob of files that end in: {', '.join(SUFFIXES)}"
    )


def read_local_files(path: str, order: DocumentOrder) -> Iterator[Document]:
    """Yield the documents of the files at ``path`` in the given order.

    Raises:
        ValueError: A file is missing, damaged, not UTF-8, or has no text field; file and line are named.
    """
    for record in islice(_records(path, order), order.start, None):
        yield record()


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _records(path: str, order: DocumentOrder) -> Iterator[Record]:
    files = list_files(path)
    order.shuffle(files)
    for file in files:
        records = _records_of(file)
        for number in range(2**62):
            block = list(islice(records, SHUFFLE_BLOCK_RECORDS))
            if not block:
                break
            order.shuffle(block, salt=f"{file.name}/{number}")
            yield from block


def _records_of(file: Path) -> Iterator[Record]:
    if file.name.endswith(".txt"):
        return iter([partial(_read_text, file)])
    return _parquet_records(file) if file.name.endswith(".parquet") else _json_lines_records(file)


def decode_utf8(data: bytes, where: Callable[[int], str]) -> str:
    """Decode, or say where the first bad byte is; ``where`` turns its offset into a place's name."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where(error.start)}: not valid UTF-8\n"
            f"  got the byte 0x{data[error.start]:02x} ({error.reason})\n"
            "  training text must be UTF-8: convert the file, or leave it out of training.dataset_path"
        ) from error


def _read_text(file: Path) -> Document:
    data = file.read_bytes()

    def place(offset: int) -> str:
        return f"{file}, line {1 + data.count(NEWLINE, 0, offset)}"

    return Document(file.name, decode_utf8(data, place))


def _json_lines_records(file: Path) -> Iterator[Record]:
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield partial(_parse_json_line, file, number, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file}: damaged gzip file\n"
            f"  got: {error}\n"
            "  download or compress the file again; `gzip --test` checks it"
        ) from error


def _parse_json_line(file: Path, number: int, line: bytes) -> Document:
    place = f"{file}, line {number}"
    text_line = decode_utf8(line, lambda offset: place)
    try:
        value = json.loads(text_line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno})\n"
            f"  got: {_shorten(text_line)}\n"
            f"  every line must be one JSON object with a string field {TEXT_FIELD!r}"
        ) from error
    text = value.get(TEXT_FIELD) if isinstance(value, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{place}: no string field {TEXT_FIELD!r}\n"
            f"  got: {_shorten(fields) or 'an empty object'}\n"
            f"  every line must be one JSON object with a string field {TEXT_FIELD!r}"
        )
    if not text.isascii():
        _check_no_surrogate(text, place)
    return Document(f"{file.name}:{number}", text)


def _check_no_surrogate(text: str, place: str) -> None:
    # JSON may spell half a surrogate pair ("\ud800"), which is no character and cannot be tokenized.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: half a surrogate pair in field {TEXT_FIELD!r}\n"
            f"  got: \\u{ord(text[error.start]):04x}\n"
            "  write the character itself, or both halves of the pair"
        ) from error


def _parquet_records(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if TEXT_FIELD not in table.schema_arrow.names:
            raise ValueError(
                f"{file}: no column {TEXT_FIELD!r}\n"
                f"  got the columns: {_shorten(', '.join(table.schema_arrow.names))}\n"
                f"  a Parquet file must hold its documents in a string column {TEXT_FIELD!r}"
            )
        number = 0
        for batch in table.iter_batches(batch_size=SHUFFLE_BLOCK_RECORDS, columns=[TEXT_FIELD]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield partial(_check_row, file, number, text)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{file}: not a readable Parquet file\n"
            f"  got: {_shorten(str(error))}\n"
            f"  write it with a string column {TEXT_FIELD!r}, or leave it out of training.dataset_path"
        ) from error


def _check_row(file: Path, number: int, text: object) -> Document:
    if not isinstance(text, str):
        raise ValueError(
            f"{file}, row {number}: column {TEXT_FIELD!r} is not a string\n"
            f"  got: {_shorten(repr(text))}\n"
            "  leave such rows out, or write an empty string"
        )
    return Document(f"{file.name}:{number}", text)


def _shorten(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
