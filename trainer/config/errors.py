"""What a bad configuration raises, and how the nearest name is found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

EXIT_BAD_INPUT = 2
"""Exit code of every command that refuses its input."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it came from and what to do about it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class ConfigError(ValueError):
    """All problems of a configuration at once."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(f"error: {problem}" for problem in self.problems))


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when there are no candidates.

    A dotted name is compared as a whole and by its last component, so that both a slip of the finger
    (``training.setps``) and a key filed under the wrong section (``training.lr``) find their home.
    """
    wanted = name.lower().replace("-", "_")
    leaf = wanted.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        other = candidate.lower()
        whole = SequenceMatcher(None, wanted, other).ratio()
        return whole + SequenceMatcher(None, leaf, other.rsplit(".", 1)[-1]).ratio()

    return max(candidates, key=likeness, default=None)


def unknown(kind: str, name: str, candidates: Iterable[str], *, list_all: bool = True) -> str:
    """Message for a name that matches nothing, with the nearest one (and all of a short list)."""
    names = list(candidates)
    guess = nearest(name, names)
    message = f"unknown {kind} {name!r}" + (f"; did you mean {guess!r}?" if guess else "")
    if list_all and 1 < len(names) <= 12:
        message += f" (known: {', '.join(names)})"
    return message
