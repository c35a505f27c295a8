"""Find a user's path: first from the current folder, then from the checkout's root.

The shipped configs name files of the checkout (``./tests/assets/tokenizer``), and a run may be started
from anywhere. So a relative path that does not exist from the current folder is looked for beside the
``trainer`` package too. A path that exists from the current folder always wins.
"""

from __future__ import annotations

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the ``trainer`` package."""


def candidate_paths(path: str) -> list[Path]:
    """The places where ``path`` may lie, in the order in which they are tried."""
    given = Path(path).expanduser()
    return [given] if given.is_absolute() else [given, PROJECT_ROOT / given]


def resolve_path(path: str) -> Path | None:
    """The first of `candidate_paths` that exists, or None."""
    return next((place for place in candidate_paths(path) if place.exists()), None)


def describe_candidates(path: str) -> str:
    """The places that `resolve_path` looked at, for an error message."""
    return ", ".join(str(place.absolute()) for place in candidate_paths(path))


def unreadable(file: Path, error: OSError) -> ValueError:
    """What is refused where a file cannot be read: no permission, gone, a disk that fails."""
    return ValueError(
        f"{file}: cannot be read\n  got: {error.strerror or error}\n"
        "  make it readable, or leave it out of training.dataset_path"
    )
