"""The datasets: a plain table from a name to a function that yields documents.

A dataset is a name, and a function ``documents(path, order)`` that yields `Document` (name, text) pairs.
Which documents come, and in which order, is a pure function of (path, seed, epoch): nothing here knows
about ranks, tokens or batches, so a run on any number of devices reads the same stream.

To add one: write such a function, a row in `DATASETS`, and a test.

The default, ``python_sources``, needs no download: it is the source code of the running Python's own
standard library, about as large as a small book shelf. One file in `HELD_OUT_ONE_IN` is held out for
validation, chosen by a hash of its relative path, so the split is the same on every machine. (The text
itself follows the Python version.)

This module imports neither torch nor a tokenizer: the config loader checks dataset names with it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data.documents import Document, DocumentOrder
from trainer.data.local_files import list_files, read_local_files
from trainer.data.paths import describe_candidates, resolve_path

HELD_OUT_ONE_IN = 20
C4_SHUFFLE_BUFFER_DOCUMENTS = 1000
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"} | {
    "encodings",  # tables of characters, and
    "pydoc_data",  # one long string: text that teaches nothing
}


@dataclass(frozen=True)
class DatasetRow:
    """One dataset.

    Attributes:
        description: One line for ``--help`` and the docs.
        documents: Yields the documents of ``path`` (None: the default) in the order asked for.
        check: Raises ValueError when ``path`` (None: the default) cannot be read; reads no document.
        default_path: What is read without ``training.dataset_path``; None when a path must be given.
        note: What a user must know about a run on the default path; the trainer logs it once.
    """

    description: str
    documents: Callable[[str | None, DocumentOrder], Iterator[Document]]
    check: Callable[[str | None], object]
    default_path: str | None = None
    note: str | None = None


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


def is_held_out(relative_path: str) -> bool:
    """Whether a source file belongs to the validation part; depends on its relative path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _python_files(held_out: bool, path: str | None) -> tuple[Path, list[str]]:
    """The root folder and the relative paths of one part of the Python files below it, sorted."""
    root = Path(_standard_library()) if path is None else resolve_path(path)
    if root is None or not root.is_dir():
        place = describe_candidates(path) if path is not None else str(root)
        raise ValueError(
            f"training.dataset_path = {path!r}: no such folder of Python files\n"
            f"  looked at: {place}\n"
            "  leave dataset_path out to read the standard library of the running Python"
        )
    files = sorted(file for file in _walk_python_files(root) if is_held_out(file) == held_out)
    if not files:
        part = "held-out .py file" if held_out else ".py file"
        raise ValueError(
            f"no {part} below {root}\n"
            "  point training.dataset_path at a folder of Python sources, or choose another dataset"
        )
    return root, files


def _walk_python_files(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - EXCLUDED_FOLDERS  # never entered: site-packages is large
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in names if name.endswith(".py"))


def _python_sources(held_out: bool, path: str | None, order: DocumentOrder) -> Iterator[Document]:
    root, files = _python_files(held_out, path)
    order.shuffle(files)
    for name in files[order.start :]:
        try:
            with tokenize.open(root / name) as file:  # honours the coding line, as Python itself does
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{root / name}: cannot be decoded as Python source\n  got: {error}\n"
                "  remove the file, or add the coding line that it lacks"
            ) from error
        yield Document(name, text)


def _standard_library() -> str:
    return sysconfig.get_path("stdlib")


def _check_c4(path: str | None) -> None:
    if path is not None:
        list_files(path)
    elif importlib.util.find_spec("datasets") is None:
        raise ValueError(
            "the c4 datasets stream from Hugging Face and need the package 'datasets'\n"
            "  install it with: pip install 'octavo[hf]'\n"
            "  or set training.dataset_path to a local copy (.json, .jsonl, .json.gz, .parquet)"
        )


def _c4(split: str, path: str | None, order: DocumentOrder) -> Iterator[Document]:
    """C4 (Raffel et al. 2019, arXiv 1910.10683) in English, streamed, or a local copy of it."""
    _check_c4(path)
    if path is not None:
        yield from read_local_files(path, order)
        return
    import datasets

    rows: Any = datasets.load_dataset("allenai/c4", name="en", split=split, streaming=True)
    rows = rows.shuffle(seed=order.seed, buffer_size=C4_SHUFFLE_BUFFER_DOCUMENTS)
    rows.set_epoch(order.epoch)
    for row in islice(rows, order.start, None):
        yield Document(row["url"], row["text"])


def _check_c4_test(path: str | None) -> None:
    if path is None:
        _python_files(False, None)
    else:
        list_files(path)


def _c4_test(path: str | None, order: DocumentOrder) -> Iterator[Document]:
    return _python_sources(False, None, order) if path is None else read_local_files(path, order)


def _require_path(path: str | None) -> str:
    if path is None:
        raise ValueError(
            "dataset 'text_files' needs training.dataset_path\n"
            "  give a file, a folder or a glob of .txt, .jsonl, .jsonl.gz or .parquet files"
        )
    return path


def _check_text_files(path: str | None) -> None:
    list_files(_require_path(path))


def _text_files(path: str | None, order: DocumentOrder) -> Iterator[Document]:
    return read_local_files(_require_path(path), order)


DATASETS: dict[str, DatasetRow] = {
    "python_sources": DatasetRow(
        description="Source files of the running Python's standard library; needs no download",
        documents=partial(_python_sources, False),
        check=partial(_python_files, False),
        default_path=_standard_library(),
    ),
    "python_sources_validation": DatasetRow(
        description="The source files that python_sources holds out, for validation",
        documents=partial(_python_sources, True),
        check=partial(_python_files, True),
        default_path=_standard_library(),
    ),
    "c4": DatasetRow(
        description="C4, English, streamed from Hugging Face, or a local copy at dataset_path",
        documents=partial(_c4, "train"),
        check=_check_c4,
        default_path="allenai/c4",
    ),
    "c4_validation": DatasetRow(
        description="The validation split of c4",
        documents=partial(_c4, "validation"),
        check=_check_c4,
        default_path="allenai/c4",
    ),
    "c4_test": DatasetRow(
        description="A local sample of C4 at dataset_path; without one, python_sources stands in",
        documents=_c4_test,
        check=_check_c4_test,
        default_path=_standard_library(),
        note=(
            "dataset c4_test: no sample of C4 is shipped, so the built-in python_sources stand in for it; "
            "set training.dataset_path to read a local sample"
        ),
    ),
    "text_files": DatasetRow(
        description="Local .txt, .jsonl, .jsonl.gz or .parquet files at dataset_path",
        documents=_text_files,
        check=_check_text_files,
    ),
}
