"""Documents from Hugging Face datasets, through the ``datasets`` package (extra ``hf``).

A reference is ``NAME[:CONFIG][@SPLIT]``: a dataset of the hub (``allenai/c4:en@validation``), a folder of
data files that ``datasets`` can read, or a folder that ``save_to_disk`` wrote. The split is ``train``
unless named.

- From the hub or data files, rows are streamed: shard after shard, the shards in an order drawn from
  (seed, epoch), and the rows of a shard shuffled block by block. A shard is a part of the order: a resumed
  run opens the shard where it was, and reads that one again up to its place.
- A saved folder is memory-mapped: its rows come in a permutation of all of them, and resuming seeks.

``datasets`` 4 and later executes no code of a dataset.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.documents import Document, DocumentOrder
from trainer.data.local_files import SHUFFLE_BLOCK_RECORDS, shuffle_blocks
from trainer.data.paths import resolve_path
from trainer.data.permutation import Permutation
from trainer.data.records import Record, shorten


class Reference(NamedTuple):
    """Which rows of which dataset."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``NAME[:CONFIG][@SPLIT]``.

        Raises:
            ValueError: There is no name.
        """
        rest, _, split = text.partition("@")
        name, _, config = rest.partition(":")
        if not name:
            raise ValueError(f"{text!r} names no dataset\n  write NAME[:CONFIG][@SPLIT], allenai/c4:en say")
        return cls(name, config or None, split or "train")


def check_package(what: str) -> None:
    """Check that ``datasets`` is installed.

    Raises:
        ValueError: It is not.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{what} is read through Hugging Face's package 'datasets', which is not installed\n"
            "  install it with: pip install 'octavo[hf]'\n"
            "  or set training.dataset_path to a local copy (.jsonl, .jsonl.gz, .parquet, ...)"
        )


def count_shards(reference: str) -> int:
    """Parts of the dataset that can be read alone."""
    rows = _open(Reference.parse(reference))
    return 1 if _is_in_memory(rows) else rows.num_shards


def read_rows(reference: str, order: DocumentOrder) -> Iterator[Document]:
    """Yield the documents of a dataset in the given order.

    Raises:
        ValueError: The dataset cannot be opened, or a row has no text and is not to be skipped.
    """
    asked = Reference.parse(reference)
    rows = _open(asked)
    if _is_in_memory(rows):
        places = Permutation(len(rows), "rows", order.seed, order.epoch)
        for index in range(order.start, len(rows)):
            yield _document(rows[places[index]], f"{asked.name}:{places[index]}", 0, order)
        return
    shards = list(range(rows.num_shards))
    order.shuffle(shards)
    for part in range(order.part, len(shards)):
        start = order.start if part == order.part else 0
        block, left_out = divmod(start, SHUFFLE_BLOCK_RECORDS)
        records = islice(
            _shard_records(rows, shards[part], asked, part, order), block * SHUFFLE_BLOCK_RECORDS, None
        )
        shuffled = shuffle_blocks(records, order, f"shard-{shards[part]}", block)
        for record in islice(shuffled, left_out, None):
            yield record()


def read_shard(reference: str, shard: int, request: DocumentOrder) -> Iterator[Document]:
    """Yield one shard's documents in the order in which they are stored.

    Raises:
        ValueError: As `read_rows`.
    """
    asked = Reference.parse(reference)
    rows = _open(asked)
    if _is_in_memory(rows):
        for index in range(len(rows)):
            yield _document(rows[index], f"{asked.name}:{index}", 0, request)
        return
    for record in _shard_records(rows, shard, asked, 0, request):
        yield record()


def _shard_records(
    rows: Any, shard: int, asked: Reference, part: int, order: DocumentOrder
) -> Iterator[Record]:
    own = rows.shard(num_shards=rows.num_shards, index=shard)
    for number, row in enumerate(own):
        yield partial(_document, row, f"{asked.name}:{shard}:{number}", part, order)


def _is_in_memory(rows: Any) -> bool:
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__")


def _open(asked: Reference) -> Any:
    check_package(f"dataset {asked.name!r}")
    import datasets

    folder = resolve_path(asked.name)
    try:
        if folder is not None and _is_saved(folder):
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, dict):
                rows = rows[asked.split]
            return rows
        name = str(folder) if folder is not None else asked.name
        return datasets.load_dataset(name, name=asked.config, split=asked.split, streaming=True)
    except Exception as error:  # of many libraries below: hub, file systems, formats
        got = shorten(f"{type(error).__name__}: {error}", 200)
        raise ValueError(
            f"dataset {asked.name!r} (config {asked.config or 'default'!r}, split {asked.split!r}) cannot be "
            f"opened\n  got: {got}\n"
            "  check name, config, split and network, or set dataset_path to a local copy"
        ) from error


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _document(row: dict[str, Any], name: str, part: int, order: DocumentOrder) -> Document:
    text = row.get(order.text_field)
    if not isinstance(text, str):
        order.bad_data.reject(
            ValueError(
                f"{name}: no string field {order.text_field!r}\n"
                f"  got: {shorten(', '.join(f'{key} ({type(row[key]).__name__})' for key in row))}\n"
                "  name the right one with training.text_field, or set training.bad_data=skip"
            )
        )
        text = ""
    return Document(name, text, part)
