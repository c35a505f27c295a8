"""Words of a command that has options of its own beside every key of a configuration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from trainer.config.errors import Problem


@dataclass
class CommandWords:
    """The command's own options, and what is left for the configuration."""

    options: dict[str, str] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    rest: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def count(self, name: str, default: int) -> int:
        """An option that is an integer from 1 up; what is not becomes a problem, and 1."""
        text = self.options.get(name)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < 1:
            self.problems.append(Problem(name, f"got {text!r}; allowed: an integer >= 1"))
            return 1
        return int(text)


def read_words(argv: Sequence[str], options: Collection[str], switches: Collection[str] = ()) -> CommandWords:
    """Sort `argv`: options (``--name VALUE``, ``--name=VALUE``; ``-`` is as ``_``), switches, the rest."""
    words, left = CommandWords(), list(argv)
    while left:
        word = left.pop(0)
        head, equals, value = word.partition("=")
        name = head if "." in head else head.replace("_", "-")
        if word in switches:
            words.switches.add(word)
        elif name in options:
            if not equals and left:
                value = left.pop(0)
            if not value or value.startswith("--"):
                words.problems.append(Problem(name, "needs a value"))
            words.options[name] = value
        else:
            words.rest.append(word)
    return words
