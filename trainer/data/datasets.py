"""The datasets: a plain table from a name to a function that yields documents.

A dataset is a name, and a function ``documents(path, order)`` that yields `Document` (name, text) pairs.
Which documents come, and in which order, is a pure function of (path, seed, epoch): nothing here knows
about ranks, tokens or batches, so a run on any number of devices reads the same stream. ``token_files`` is
the one row without documents: its text was tokenized before (`trainer.data.token_files`).

To add one: write such a function, a row in `DATASETS`, and a test.

This module imports neither torch nor a tokenizer: the config loader checks dataset names with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.data.documents import Document, DocumentOrder
from trainer.data.hugging_face import Reference, check_package, read_rows
from trainer.data.local_files import list_files, read_local_files
from trainer.data.python_sources import list_python_files, read_python_files, standard_library
from trainer.data.token_manifest import read_manifest


@dataclass(frozen=True)
class DatasetRow:
    """One dataset.

    Attributes:
        description: One line for ``--help`` and the docs.
        documents: Yields the documents of ``path`` (None: the default) in the order asked for.
        check: Raises ValueError when ``path`` (None: the default) cannot be read; reads no document.
        default_path: What is read without ``training.dataset_path``; None when a path must be given.
        note: What a user must know about a run on the default path; the trainer logs it once.
        files: The files that ``path`` stands for; what changed in them since a checkpoint is noticed.
        hub: The Hugging Face reference that ``path`` stands for, or None where it stands for files.
        is_records: A given ``path`` is local files that `trainer.data.records` reads.
        is_tokens: ``path`` is a folder of token files, and ``documents`` is not called.
    """

    description: str
    documents: Callable[[str | None, DocumentOrder], Iterator[Document]]
    check: Callable[[str | None], object]
    default_path: str | None = None
    note: str | None = None
    files: Callable[[str | None], list[Path]] | None = None
    hub: Callable[[str | None], str | None] | None = None
    is_records: bool = False
    is_tokens: bool = False


def dataset_row(name: str) -> DatasetRow:
    """The row of `DATASETS` with this name.

    Raises:
        ValueError: No dataset has this name.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"no dataset is named {name!r}{hint}\n  datasets: {', '.join(DATASETS)}")
    return DATASETS[name]


def check_dataset(name: str, dataset_path: str | None = None) -> None:
    """Check, before anything is built, that a dataset exists and can be opened.

    Raises:
        ValueError: Unknown name, a path that matches nothing, or a package that is missing.
    """
    dataset_row(name).check(dataset_path)


def dataset_note(name: str, dataset_path: str | None = None) -> str | None:
    """What the trainer must tell the user about this dataset, or None."""
    return dataset_row(name).note if dataset_path is None else None


def _python_files(held_out: bool, path: str | None) -> list[Path]:
    root, names = list_python_files(held_out, path)
    return [root / name for name in names]


def _python_row(description: str, held_out: bool) -> DatasetRow:
    return DatasetRow(
        description,
        documents=partial(read_python_files, held_out),
        check=partial(list_python_files, held_out),
        default_path=standard_library(),
        files=partial(_python_files, held_out),
    )


def _c4_reference(split: str, path: str | None) -> str | None:
    return f"allenai/c4:en@{split}" if path is None else None


def _c4(split: str, path: str | None, order: DocumentOrder) -> Iterator[Document]:
    """C4 (Raffel et al. 2019, arXiv 1910.10683) in English, streamed, or a local copy of it."""
    reference = _c4_reference(split, path)
    return read_local_files(str(path), order) if reference is None else read_rows(reference, order)


def _check_c4(path: str | None) -> None:
    if path is not None:
        list_files(path)
    else:
        check_package("c4")


def _c4_row(description: str, split: str) -> DatasetRow:
    return DatasetRow(
        description,
        documents=partial(_c4, split),
        check=_check_c4,
        default_path="allenai/c4",
        files=lambda path: [] if path is None else list_files(path),
        hub=partial(_c4_reference, split),
        is_records=True,
    )


def _c4_test_files(path: str | None) -> list[Path]:
    return _python_files(False, None) if path is None else list_files(path)


def _c4_test(path: str | None, order: DocumentOrder) -> Iterator[Document]:
    return read_python_files(False, None, order) if path is None else read_local_files(path, order)


def _given(name: str, what: str, path: str | None) -> str:
    if path is None:
        raise ValueError(f"dataset {name!r} needs training.dataset_path\n  give {what}")
    return path


_text_path = partial(
    _given,
    "text_files",
    "a file, a folder or a glob of .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files",
)
_hub_path = partial(_given, "hugging_face", "NAME[:CONFIG][@SPLIT], allenai/c4:en@train say")
_tokens_path = partial(_given, "token_files", "the folder that `octavo tokenize` wrote")


def _check_hub(path: str | None) -> None:
    Reference.parse(_hub_path(path))
    check_package(f"dataset {path!r}")


def _no_documents(path: str | None, order: DocumentOrder) -> Iterator[Document]:
    raise ValueError(f"{path}: holds tokens and no text\n  give the text that it was made from")


DATASETS: dict[str, DatasetRow] = {
    "python_sources": _python_row(
        "Source files of the running Python's standard library; needs no download", held_out=False
    ),
    "python_sources_validation": _python_row(
        "The source files that python_sources holds out, for validation", held_out=True
    ),
    "c4": _c4_row("C4, English, streamed from Hugging Face, or a local copy at dataset_path", "train"),
    "c4_validation": _c4_row("The validation split of c4", "validation"),
    "c4_test": DatasetRow(
        description="A local sample of C4 at dataset_path; without one, python_sources stands in",
        documents=_c4_test,
        check=_c4_test_files,
        default_path=standard_library(),
        note=(
            "dataset c4_test: no sample of C4 is shipped, so the built-in python_sources stand in for it; "
            "set training.dataset_path to read a local sample"
        ),
        files=_c4_test_files,
        is_records=True,
    ),
    "text_files": DatasetRow(
        description="Local .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files at dataset_path",
        documents=lambda path, order: read_local_files(_text_path(path), order),
        check=lambda path: list_files(_text_path(path)),
        files=lambda path: list_files(_text_path(path)),
        is_records=True,
    ),
    "token_files": DatasetRow(
        description="Tokens at dataset_path, a folder that `octavo tokenize` wrote",
        documents=_no_documents,
        check=lambda path: read_manifest(_tokens_path(path)),
        is_tokens=True,
    ),
    "hugging_face": DatasetRow(
        description="Any dataset of Hugging Face's hub or disk format: NAME[:CONFIG][@SPLIT] at dataset_path",
        documents=lambda path, order: read_rows(_hub_path(path), order),
        check=_check_hub,
        hub=_hub_path,
    ),
}
