"""The built-in dataset: the source code of the running Python's own standard library.

It needs no download and is about as large as a small book shelf. One file in `HELD_OUT_ONE_IN` is held out
for validation, chosen by a hash of its relative path, so the split is the same on every machine. (The text
itself follows the Python version.)
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from trainer.data.documents import Document, DocumentOrder
from trainer.data.paths import describe_candidates, resolve_path

HELD_OUT_ONE_IN = 20
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"} | {
    "encodings",  # tables of characters, and
    "pydoc_data",  # one long string: text that teaches nothing
}


def standard_library() -> str:
    """The folder of the running Python's standard library."""
    return sysconfig.get_path("stdlib")


def is_held_out(relative_path: str) -> bool:
    """Whether a source file belongs to the validation part; depends on its relative path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def list_python_files(held_out: bool, path: str | None) -> tuple[Path, list[str]]:
    """The root folder and the relative paths of one part of the Python files below it, sorted.

    Raises:
        ValueError: No such folder, or no such file in it.
    """
    root = Path(standard_library()) if path is None else resolve_path(path)
    if root is None or not root.is_dir():
        place = describe_candidates(path) if path is not None else str(root)
        raise ValueError(
            f"training.dataset_path = {path!r}: no such folder of Python files\n"
            f"  looked at: {place}\n"
            "  leave dataset_path out to read the standard library of the running Python"
        )
    files = sorted(file for file in _walk(root) if is_held_out(file) == held_out)
    if not files:
        part = "held-out .py file" if held_out else ".py file"
        raise ValueError(
            f"no {part} below {root}\n"
            "  point training.dataset_path at a folder of Python sources, or choose another dataset"
        )
    return root, files


def read_python_files(held_out: bool, path: str | None, order: DocumentOrder) -> Iterator[Document]:
    """Yield one part of the Python files below ``path`` in the given order.

    Raises:
        ValueError: A file cannot be decoded, and is not to be skipped.
    """
    root, files = list_python_files(held_out, path)
    order.shuffle(files)
    for name in files[order.start :]:
        try:
            with tokenize.open(root / name) as file:  # honours the coding line, as Python itself does
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            order.bad_data.reject(
                ValueError(
                    f"{root / name}: cannot be decoded as Python source\n  got: {error}\n"
                    "  remove the file, or add the coding line that it lacks"
                )
            )
            text = ""
        yield Document(name, text)


def _walk(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - EXCLUDED_FOLDERS  # never entered: site-packages is large
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in names if name.endswith(".py"))
