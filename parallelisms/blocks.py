"""Find a model's parts by the FQNs and patterns that it declares."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks_of(model: nn.Module, fqn: str) -> Iterator[tuple[str, nn.Module]]:
    """(FQN, block) of every block in the list that `fqn` names."""
    for name, block in model.get_submodule(fqn).named_children():
        yield f"{fqn}.{name}", block


def matches(pattern: str, fqn: str) -> bool:
    """True where `fqn` fits `pattern`, whose ``*`` stands for one component."""
    wanted, parts = pattern.split("."), fqn.split(".")
    return len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))
