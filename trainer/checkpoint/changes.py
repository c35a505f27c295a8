"""What changed in the configuration since a checkpoint was saved. Torch-free.

A change that takes effect (learning rate, batch size, layout, ...) is listed; one that makes the state
meaningless (another model) is refused by whoever finds that the tensors do not fit, with `culprit`'s help.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Sections that say where and how to report, and nothing about what is trained.
_ASIDE = ("job", "metrics", "profiling", "checkpoint", "comm", "memory_estimation", "experimental")
_MOST = 8


def flat_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting as JSON gives it back: what does not fit JSON becomes text."""
    return json.loads(json.dumps(dict(values), default=str))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (then, now) of all settings that differ and matter to the training."""
    keys = [key for key in {**now, **before} if key.partition(".")[0] not in _ASIDE]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def describe(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """``optimizer.lr 0.001 -> 0.0005, ...``; long lists are cut."""
    shown = [f"{key} {_short(then)} -> {_short(new)}" for key, (then, new) in differences.items()]
    more = f" and {len(shown) - _MOST} more" if len(shown) > _MOST else ""
    return ", ".join(shown[:_MOST]) + more


def culprit(differences: Mapping[str, tuple[Any, Any]], section: str) -> str | None:
    """The first setting of `section` that differs, where one does."""
    return next((key for key in differences if key.startswith(f"{section}.")), None)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
