"""What the readers (TOML files, command line) hand to the loader: settings, in layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config.errors import Problem


@dataclass(frozen=True)
class Words:
    """A command-line value before its key's type is known: the words behind the flag."""

    words: tuple[str, ...]
    append: bool = False
    """True for ``--key+=a,b``: add to the list below rather than replace it."""
    negated: bool = False
    """True for ``--no-key``: the key is a boolean and is switched off."""


@dataclass(frozen=True)
class Setting:
    """One key as a user wrote it."""

    key: str
    value: Any
    """A TOML value, or Words."""
    where: str
    """``file:line``, or the flag as typed."""


@dataclass(frozen=True)
class Layer:
    """All settings of one source; a later layer wins over an earlier one."""

    name: str
    settings: Sequence[Setting]
    sections: Sequence[tuple[str, str]] = ()
    """Sections mentioned (name, where), so that an empty misspelt one is noticed."""
    problems: Sequence[Problem] = field(default=())
    """What could not be read at all."""
