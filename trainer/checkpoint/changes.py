"""What changed in the configuration since a checkpoint was saved. Torch-free.

A change that takes effect (learning rate, batch size, layout, ...) is listed. One that gives tensors other
shapes is refused by whoever finds that they do not fit, with `culprit`'s help. One that leaves the shapes and
changes what the weights compute (rope_theta, norm_eps, the number of heads, ...) is found by comparing the
model's settings in effect, which may differ without a setting that does: a flavor can be another one by now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainer.config import derived

# Sections that say where and how to report, and nothing about what is trained.
_ASIDE = ("job", "metrics", "profiling", "checkpoint", "comm", "memory_estimation", "experimental")
_MOST = 8
# How long the RoPE table is, and which kernel computes: the same function.
_SAME_FUNCTION = ("max_seq_len", "attn_backend", "swiglu_kernel", "norm_kernel", "rope_kernel")


def flat_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting as JSON gives it back: what does not fit JSON becomes text."""
    return json.loads(json.dumps(dict(values), default=str))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (then, now) of all settings that differ and matter to the training."""
    keys = [key for key in {**now, **before} if key.partition(".")[0] not in _ASIDE]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def model_settings(config: Any) -> dict[str, Any]:
    """What decides the function that the weights compute: the model's name, and its settings in effect."""
    settings = {"name": config.model.name, **asdict(derived.model_config(config))}
    return flat_settings({key: value for key, value in settings.items() if key not in _SAME_FUNCTION})


def changed_function(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (then, now) of `model_settings` that differ; one that is new or gone is none of them."""
    return {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}


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
