"""One data file to records: ``.txt``, JSON lines (plain, gzipped or Zstandard) and Parquet.

A record is a document that is not parsed yet, so that passing records by, on the way to where a run
resumes, costs reading and no parsing. What cannot be read is refused or left out, as the request's
`BadData` says, and the message names the file and the line or row.

A span is a part of a file that can be read alone: bytes of a ``.txt`` or JSON lines file, row groups of a
Parquet file. The spans of a file hold each of its records once; a JSON line belongs to the span in which
it begins. A compressed file has no spans.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from trainer.data.documents import Document, DocumentOrder
from trainer.data.paths import unreadable

JSON_LINES_SUFFIXES = (".jsonl", ".json")
COMPRESSED_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
SUFFIXES = (".txt", *JSON_LINES_SUFFIXES, *COMPRESSED_SUFFIXES, ".parquet")

PIECE_BYTES = 1 << 20
"""A long text is read in pieces of at least this, cut where a line begins with an ASCII letter."""
CUT = re.compile(rb"\n(?=[A-Za-z])")
_ROWS_AT_ONCE = 1024
_READ_BYTES = 1 << 20

Record = Callable[[], Document]
"""A document that is not parsed yet."""


class Span(NamedTuple):
    """From ``start`` to before ``stop``: bytes, or row groups of a Parquet file."""

    start: int
    stop: int


def read_records(
    file: Path, request: DocumentOrder, part: int = 0, first: int = 0, span: Span | None = None
) -> Iterator[Record]:
    """The records of one file from the ``first``-th on, in the order of the file.

    Raises:
        ValueError: The file or a record cannot be read, and is not to be skipped; a record's own error
            comes when it is called.
    """
    try:
        if file.name.endswith(".parquet"):
            yield from _parquet_records(file, request, part, first, span)
        elif file.name.endswith(".txt"):
            yield from islice(_text_records(file, request, part, span), first, None)
        else:
            yield from islice(_json_lines_records(file, request, part, span), first, None)
    except OSError as error:
        request.bad_data.reject(unreadable(file, error))


def shorten(text: str, limit: int = 80) -> str:
    """One line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _checked(document: Callable[[], Document], name: str, part: int, request: DocumentOrder) -> Document:
    """The document, or an empty one in the place of one that is left out."""
    try:
        return document()
    except ValueError as error:
        request.bad_data.reject(error)
        return Document(name, "", part)


def decode_utf8(data: bytes, where: Callable[[int], str], encoding: str = "utf-8-sig") -> str:
    """Decode, or say where the first bad byte is; ``where`` turns its offset into a place's name."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where(error.start)}: not valid UTF-8\n"
            f"  got the byte 0x{data[error.start]:02x} ({error.reason})\n"
            "  training text must be UTF-8: convert the file, leave it out, or set training.bad_data=skip"
        ) from error


def _text_records(file: Path, request: DocumentOrder, part: int, span: Span | None) -> Iterator[Record]:
    if not request.pieces:
        yield lambda: _checked(partial(_whole_text, file, part), file.name, part, request)
        return
    whole = Span(0, file.stat().st_size)
    asked = span or whole
    for start, data in _pieces(file, asked):
        end = start + len(data)
        opens, closes = start == 0, end >= whole.stop
        yield partial(_text_piece, file, data, start, Document(file.name, "", part, opens, closes), request)


def _whole_text(file: Path, part: int) -> Document:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    return Document(file.name, decode_utf8(data, partial(_line_at, file, 0)), part)


def _text_piece(file: Path, data: bytes, start: int, empty: Document, request: DocumentOrder) -> Document:
    try:
        text = decode_utf8(data, partial(_line_at, file, start), "utf-8-sig" if empty.opens else "utf-8")
    except ValueError as error:
        request.bad_data.reject(error)
        return empty
    return empty._replace(text=text)


def _line_at(file: Path, start: int, offset: int) -> str:
    return f"{file}, line {1 + _newlines_before(file, start + offset)}"


def _newlines_before(file: Path, end: int) -> int:
    count = 0
    with file.open("rb") as data:
        while end > 0 and (chunk := data.read(min(end, _READ_BYTES))):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


def text_cut(file: Path, offset: int) -> int:
    """The first place from ``offset`` on where a text may be cut, or the file's end."""
    size = file.stat().st_size
    with file.open("rb") as data:
        data.seek(max(0, offset - 1))
        place, before = max(0, offset - 1), b""
        while chunk := data.read(_READ_BYTES):
            found = CUT.search(before + chunk)
            if found:
                return place - len(before) + found.end()
            place, before = place + len(chunk), chunk[-1:]
    return size


def _pieces(file: Path, span: Span) -> Iterator[tuple[int, bytes]]:
    """Pieces of a text with their offsets; a span must begin and end at cuts."""
    place, buffer = span.start, b""
    with file.open("rb") as data:
        data.seek(span.start)
        left, searched = span.stop - span.start, 0
        while left > 0:
            chunk = data.read(min(left, _READ_BYTES))
            if not chunk:
                break
            left -= len(chunk)
            buffer += chunk
            while found := CUT.search(buffer, max(PIECE_BYTES, searched)):
                yield place, buffer[: found.end()]
                place, buffer, searched = place + found.end(), buffer[found.end() :], 0
            searched = max(0, len(buffer) - 1)
    if buffer or span == Span(0, 0):
        yield place, buffer


def _open_lines(file: Path) -> IO[bytes]:
    if file.name.endswith(COMPRESSED_SUFFIXES) and file.stat().st_size == 0:
        raise EOFError("the file has no bytes, not even those of an empty archive")
    if file.name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(file, "rb"))
    if file.name.endswith(".zst"):
        import pyarrow

        stream = pyarrow.input_stream(str(file), compression="zstd")
        return cast(IO[bytes], io.BufferedReader(stream, _READ_BYTES))
    return file.open("rb")


def _json_lines_records(file: Path, request: DocumentOrder, part: int, span: Span | None) -> Iterator[Record]:
    compressed = file.name.endswith(COMPRESSED_SUFFIXES)
    try:
        with _open_lines(file) as lines:
            place, stop = 0, None
            if span is not None:
                place, stop = span.start, span.stop
                if place > 0:
                    lines.seek(place - 1)
                    place += len(lines.readline()) - 1  # the line that began in the span before
            for number, line in enumerate(lines, start=1):
                if stop is not None and place >= stop:
                    break
                if line.strip():
                    yield partial(_json_line_record, file, part, number, line, request, span)
                place += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        if not compressed or getattr(error, "errno", None) is not None:  # the archive is not to blame
            raise
        kind, tool = ("gzip", "gzip") if file.name.endswith(".gz") else ("Zstandard", "zstd")
        request.bad_data.reject(
            ValueError(
                f"{file}: damaged {kind} file\n"
                f"  got: {error}\n"
                f"  download or compress the file again; `{tool} --test` checks it"
            )
        )


def _json_line_record(
    file: Path, part: int, number: int, line: bytes, request: DocumentOrder, span: Span | None
) -> Document:
    name = f"{file.name}:{number}"

    def place() -> str:
        before = _newlines_before(file, span.start) if span else 0
        # The span's own first line is one that begins after its start.
        first = span is not None and span.start > 0 and _byte_before(file, span.start) != b"\n"
        return f"{file}, line {number + before + int(first)}"

    return _checked(
        lambda: Document(name, _json_text(line, place, request.text_field), part), name, part, request
    )


def _byte_before(file: Path, offset: int) -> bytes:
    with file.open("rb") as data:
        data.seek(offset - 1)
        return data.read(1)


def _json_text(line: bytes, place: Callable[[], str], field: str) -> str:
    text_line = decode_utf8(line, lambda offset: place())
    hint = f"  every line must be one JSON object with a string field {field!r}"
    try:
        value = json.loads(text_line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place()}: not valid JSON ({error.msg} at column {error.colno})\n"
            f"  got: {shorten(text_line)}\n{hint}"
        ) from error
    except (RecursionError, ValueError) as error:  # too deep, or a number of too many digits
        raise ValueError(f"{place()}: JSON that cannot be read\n  got: {error}\n{hint}") from None
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{place()}: no string field {field!r}\n  got: {shorten(fields) or 'an empty object'}\n{hint}"
        )
    if not text.isascii():
        _check_no_surrogate(text, place, field)
    return text


def _check_no_surrogate(text: str, place: Callable[[], str], field: str) -> None:
    # JSON may spell half a surrogate pair ("\ud800"), which is no character and cannot be tokenized.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place()}: half a surrogate pair in field {field!r}\n"
            f"  got: \\u{ord(text[error.start]):04x}\n"
            "  write the character itself, or both halves of the pair"
        ) from error


def open_parquet(file: Path, field: str) -> Any:
    """The Parquet file, with its text column checked.

    Raises:
        ValueError: It cannot be read, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable_parquet(file, field, error) from error
    if field not in table.schema_arrow.names:
        raise ValueError(
            f"{file}: no column {field!r}\n"
            f"  got the columns: {shorten(', '.join(table.schema_arrow.names))}\n"
            f"  a Parquet file must hold its documents in a string column {field!r}"
        )
    return table


def _unreadable_parquet(file: Path, field: str, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: not a readable Parquet file\n"
        f"  got: {shorten(str(error))}\n"
        f"  write it with a string column {field!r}, or leave it out of training.dataset_path"
    )


def _parquet_records(
    file: Path, request: DocumentOrder, part: int, first: int, span: Span | None
) -> Iterator[Record]:
    import pyarrow

    field = request.text_field
    try:
        table = open_parquet(file, field)
        rows = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        groups = list(range(*(span or Span(0, len(rows)))))
        number = sum(rows[: groups[0]]) if groups else 0
        while groups and first >= rows[groups[0]]:  # not even opened
            first -= rows[groups[0]]
            number += rows[groups.pop(0)]
        for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[field]):
            texts = batch.column(0).to_pylist()
            passed = min(first, len(texts))
            first, number = first - passed, number + passed
            for text in texts[passed:]:
                number += 1
                yield partial(_parquet_row, file, part, number, text, request)
    except ValueError as error:
        known = not isinstance(error, pyarrow.ArrowException | UnicodeDecodeError)
        request.bad_data.reject(error if known else _unreadable_parquet(file, field, error))
    except (pyarrow.ArrowException, OSError) as error:
        request.bad_data.reject(_unreadable_parquet(file, field, error))


def _parquet_row(file: Path, part: int, number: int, text: object, request: DocumentOrder) -> Document:
    name = f"{file.name}:{number}"

    def document() -> Document:
        if not isinstance(text, str):
            raise ValueError(
                f"{file}, row {number}: column {request.text_field!r} is not a string\n"
                f"  got: {shorten(repr(text))}\n"
                "  leave such rows out, write an empty string, or set training.bad_data=skip"
            )
        return Document(name, text, part)

    return _checked(document, name, part, request)
