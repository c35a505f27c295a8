"""Documents from local files, in a random order: ``.txt``, JSON lines (also compressed) and Parquet.

What a path may be: one file, a folder (searched recursively; hidden files and other suffixes are left
out), or a glob (``data/**/*.jsonl.gz``). What is a document: a whole ``.txt`` file, one line of JSON
lines, one row of a Parquet file; `trainer.data.records` reads them.

Order: the files are sorted by path, then shuffled by (seed, epoch); within a file, records are shuffled
in blocks of `SHUFFLE_BLOCK_RECORDS`. A block is all that is held in memory, so a first document comes
quickly from a file of any size; the price is that documents far apart in one file never trade places.
A file is a part of the order: a resumed run opens the file where it was and none before it.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from trainer.data.documents import Document, DocumentOrder
from trainer.data.paths import candidate_paths, describe_candidates
from trainer.data.records import SUFFIXES, Record, read_records

SHUFFLE_BLOCK_RECORDS = 1024


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
    files = list_files(path)
    order.shuffle(files)
    for part, file in enumerate(files):
        if part < order.part:
            continue
        start = order.start if part == order.part else 0
        for record in _shuffled_records(file, order, part, start):
            yield record()


def shuffle_blocks(
    records: Iterator[Record], order: DocumentOrder, name: str, first: int
) -> Iterator[Record]:
    """Shuffle block by block; ``records`` begins with block number ``first``."""
    for number in range(first, 2**62):
        block = list(islice(records, SHUFFLE_BLOCK_RECORDS))
        if not block:
            return
        order.shuffle(block, salt=f"{name}/{number}")
        yield from block


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _shuffled_records(file: Path, order: DocumentOrder, part: int, start: int) -> Iterator[Record]:
    """One file's records from the ``start``-th of its shuffled order on."""
    if file.name.endswith(".txt"):
        return read_records(file, order, part, start)  # one text, or its pieces in their order
    block, left_out = divmod(start, SHUFFLE_BLOCK_RECORDS)
    records = read_records(file, order, part, block * SHUFFLE_BLOCK_RECORDS)
    return islice(shuffle_blocks(records, order, file.name, block), left_out, None)
