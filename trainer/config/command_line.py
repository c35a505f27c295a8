"""Split a command line into settings: flags and the words behind them.

A flag is a dotted key: ``--training.steps 100``, ``--training.steps=100``. Dashes and underscores in it
mean the same. A boolean takes ``--a.b``, ``--a.b=false``, ``--a.b false``, ``--no-a.b`` and ``--a.no_b``.
A list takes ``a,b`` or several words, and ``--key+=a,b`` adds to what the TOML file says. Types are not
known here: the loader checks the words against the key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.config.errors import Problem
from trainer.config.settings import Layer, Setting, Words

_NUMBER = re.compile(r"-\.?\d.*")


def read_command_line(argv: Sequence[str]) -> Layer:
    """The command line as the last layer; words that belong to no flag are its problems."""
    settings: list[Setting] = []
    problems: list[Problem] = []
    index = 0
    while index < len(argv):
        token = argv[index]
        index += 1
        if not _is_flag(token):
            problems.append(
                Problem("command line", f"{token!r} belongs to no flag; flags look like --section.key")
            )
            continue
        name, equals, value = token[2:].partition("=")
        words: list[str] = [value] if equals else []
        while not equals and index < len(argv) and not _is_flag(argv[index]):
            words.append(argv[index])
            index += 1
        append = name.endswith("+")
        key, negated = _normal(name.removesuffix("+"))
        settings.append(Setting(key, Words(tuple(words), append, negated), f"--{name}"))
    return Layer("command line", settings, problems=problems)


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2 and not _NUMBER.fullmatch(token)


def _normal(name: str) -> tuple[str, bool]:
    """``no-a.b-c`` and ``a.no_b_c`` -> (``a.b_c``, True); ``a.b-c`` -> (``a.b_c``, False)."""
    key = name.replace("-", "_")
    if key.startswith("no_"):
        return key.removeprefix("no_"), True
    section, dot, leaf = key.rpartition(".")
    if dot and leaf.startswith("no_"):
        return f"{section}.{leaf.removeprefix('no_')}", True
    return key, False
