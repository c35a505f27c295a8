"""How a source is divided into units of work, each of which becomes one shard.

The division follows from the source alone and not from the number of workers, so neither do the shards.
Small files share a unit; a large ``.jsonl`` or Parquet file is read in spans, and so is a large ``.txt``
where the tokenizer allows for it. A compressed file is one unit, whatever its size: many files give many
workers something to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.data.datasets import DATASETS, dataset_row
from trainer.data.documents import Document, DocumentOrder
from trainer.data.hugging_face import count_shards, read_shard
from trainer.data.identity import identify_files
from trainer.data.records import COMPRESSED_SUFFIXES, Span, open_parquet, read_records, text_cut

UNIT_BYTES = 64 << 20
_MOST_UNITS = 4096


@dataclass(frozen=True)
class TextSource:
    """What is tokenized: a row of the table and its path."""

    dataset: str
    path: str | None
    text_field: str

    @classmethod
    def parse(cls, text: str, text_field: str) -> TextSource:
        """Read a path, a name of the table, or ``NAME:PATH``.

        Raises:
            ValueError: It is no text, or cannot be opened.
        """
        name, colon, path = text.partition(":")
        if name in DATASETS and not Path(text).exists():
            source = cls(name, path if colon else None, text_field)
        else:
            source = cls("text_files", text, text_field)
        row = dataset_row(source.dataset)
        if row.is_tokens:
            raise ValueError(f"{text}: holds tokens and no text\n  give the text that it was made from")
        row.check(source.path)
        return source


@dataclass(frozen=True)
class Unit:
    """A part of the source that is read alone.

    Attributes:
        number: Its place.
        size: Bytes of its source, near enough for a progress bar.
        files: Whole files, or the one that ``span`` is a part of.
        span: Bytes or row groups of the file; None for all of it.
        shard: Of a Hugging Face dataset; None for another source.
    """

    number: int
    size: int
    files: tuple[str, ...] = ()
    span: Span | None = None
    shard: int | None = None


def plan_units(source: TextSource, splits_at_lines: bool) -> list[Unit]:
    """Divide the source.

    Raises:
        ValueError: A dataset cannot be opened.
    """
    row = dataset_row(source.dataset)
    reference = row.hub(source.path) if row.hub else None
    parts: list[_Part]
    if reference is not None:
        parts = [(0, (), None, shard) for shard in range(count_shards(reference))]
    elif row.is_records and source.path is not None and row.files is not None:
        files = row.files(source.path)
        parts = list(_file_parts(files, source.text_field, splits_at_lines))
    else:
        size = sum(file.stat().st_size for file in row.files(source.path)) if row.files else 0
        parts = [(size, (), None, None)]
    return [Unit(number, *part) for number, part in enumerate(parts)]


def plan_digest(units: list[Unit], settings: dict[str, object]) -> str:
    """What the shards follow from, in one word; files' places do not matter, names and contents do.

    Raises:
        ValueError: A file cannot be read, and is not to be skipped.
    """
    rows = [{**asdict(unit), "files": [Path(file).name for file in unit.files]} for unit in units]
    files = sorted({Path(file) for unit in units for file in unit.files})
    content = identify_files(files, settings["bad_data"] == "skip").get("mark")
    return hashlib.sha256(json.dumps([rows, content, settings], sort_keys=True).encode()).hexdigest()


def read_unit(source: TextSource, unit: Unit, request: DocumentOrder) -> Iterator[Document]:
    """The documents of a unit, in the order in which they are stored.

    Raises:
        ValueError: One cannot be read, and is not to be skipped.
    """
    row = dataset_row(source.dataset)
    if unit.shard is not None and row.hub is not None:
        yield from read_shard(str(row.hub(source.path)), unit.shard, request)
    elif unit.files:
        for file in unit.files:
            for record in read_records(Path(file), request, span=unit.span):
                yield record()
    else:
        yield from row.documents(source.path, request)


_Part = tuple[int, tuple[str, ...], Span | None, int | None]


def _file_parts(files: list[Path], text_field: str, splits_at_lines: bool) -> Iterator[_Part]:
    sizes = {file: file.stat().st_size for file in files}
    least = max(UNIT_BYTES, sum(sizes.values()) // _MOST_UNITS)
    group: list[str] = []
    held = 0
    for file in files:
        spans = [] if sizes[file] <= least else _spans(file, sizes[file], least, text_field, splits_at_lines)
        if len(spans) > 1:
            if group:
                yield held, tuple(group), None, None
                group, held = [], 0
            for span, size in spans:
                yield size, (str(file),), span, None
            continue
        group.append(str(file))
        held += sizes[file]
        if held >= least:
            yield held, tuple(group), None, None
            group, held = [], 0
    if group:
        yield held, tuple(group), None, None


def _spans(
    file: Path, size: int, least: int, text_field: str, splits_at_lines: bool
) -> list[tuple[Span, int]]:
    """The spans of a large file with their sizes; none where it cannot be divided."""
    if file.name.endswith(COMPRESSED_SUFFIXES):
        return []
    if file.name.endswith(".parquet"):
        return _row_group_spans(file, least, text_field)
    places = list(range(0, size, least))
    if file.name.endswith(".txt"):
        if not splits_at_lines:
            return []
        places = sorted({0, *(text_cut(file, place) for place in places[1:])} - {size})
    ends = [*places[1:], size]
    return [(Span(start, end), end - start) for start, end in zip(places, ends, strict=True)]


def _row_group_spans(file: Path, least: int, text_field: str) -> list[tuple[Span, int]]:
    try:
        metadata = open_parquet(file, text_field).metadata
    except ValueError:  # whoever reads it refuses it, or leaves it out
        return []
    spans: list[tuple[Span, int]] = []
    start = held = 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= least or group == metadata.num_row_groups - 1:
            spans.append((Span(start, group + 1), held))
            start, held = group + 1, 0
    return spans
