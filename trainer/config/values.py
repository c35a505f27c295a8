"""From what a user wrote to a typed value, or a sentence that says what is allowed.

Two doors, one room: a TOML value arrives typed, a command-line value as a list of words; both leave
through `check`, so the same rules hold for both.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import tomli

from trainer.config.errors import nearest

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")
NONE_WORDS = ("none", "null")


class BadValueError(ValueError):
    """The value cannot be had for this key; the message says what was got and what is allowed."""


def from_toml(value: Any, hint: Any, bounds: Mapping[str, float]) -> Any:
    """Check a value that TOML has typed already."""
    if isinstance(value, str) and _is_list(hint):
        return from_words([value], hint, bounds)
    if isinstance(value, str) and value.lower() in NONE_WORDS and _is_optional(hint):
        return None
    return check(value, hint, bounds)


def from_words(words: Sequence[str], hint: Any, bounds: Mapping[str, float]) -> Any:
    """Read a value from command-line words and check it."""
    inner, optional = strip_optional(hint)
    text = " ".join(words)
    if optional and text.lower() in NONE_WORDS:
        return None
    if _is_list(hint):
        return check(_read_list(text), hint, bounds)
    if len(words) != 1:
        got = "no value" if not words else f"{len(words)} values ({text})"
        raise BadValueError(f"got {got}; allowed: {describe(hint, bounds)}")
    more = switch_words(hint)
    if more is not None:
        return text if text in more else _read_bool(text, hint)
    if inner is int and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return check(int(text), hint, bounds)
    if inner is float:
        try:
            return check(float(text), hint, bounds)
        except ValueError as error:
            if isinstance(error, BadValueError):
                raise
    if inner in (int, float):
        raise BadValueError(f"got {text!r}; allowed: {describe(hint, bounds)}")
    return check(text, hint, bounds)


def check(value: Any, hint: Any, bounds: Mapping[str, float]) -> Any:
    """Return `value` as the type `hint` asks for, or raise BadValueError."""
    inner, optional = strip_optional(hint)
    if value is None and optional:
        return None
    if get_origin(inner) is list:
        item = get_args(inner)[0]
        if not isinstance(value, list):
            raise BadValueError(f"got {show(value)}; allowed: {describe(hint, bounds)}")
        return [check(entry, item, {}) for entry in value]
    if get_origin(inner) is Literal:
        return _check_choice(value, hint, inner)
    if isinstance(value, str) and value in (switch_words(hint) or ()):
        return value
    if inner is not bool and switch_words(hint):
        inner = bool
    if inner is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if inner is not Any and type(value) is not inner:
        raise BadValueError(f"got {show(value)}; allowed: {describe(hint, bounds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadValueError(f"got {value}; allowed: a finite number")
    _check_bounds(value, hint, bounds)
    return value


def describe(hint: Any, bounds: Mapping[str, float] | None = None) -> str:
    """What a type allows, in words for an error message."""
    inner, optional = strip_optional(hint)
    if get_origin(inner) is Literal:
        text = ", ".join(repr(choice) for choice in get_args(inner))
    elif words := switch_words(inner):
        text = f"{', '.join(repr(word) for word in words)}, true or false"
    elif get_origin(inner) is list:
        text = "a list of strings" if get_args(inner)[0] is str else "a list of lists of strings"
    else:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        text = names.get(inner, str(inner))
    limits = {"min": ">=", "above": ">", "max": "<=", "below": "<"}
    ranges = [f"{sign} {bounds[name]:g}" for name, sign in limits.items() if bounds and name in bounds]
    if ranges:
        text += f" {' and '.join(ranges)}"
    return f"{text} or none" if optional else text


def show(value: Any) -> str:
    """A value with its kind, shortened, for an error message."""
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    kinds = {bool: "", int: "integer ", float: "number ", str: "string ", list: "list "}
    return f"{kinds.get(type(value), '')}{text.lower() if isinstance(value, bool) else text}"


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into (X, True); any other type into (it, False)."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return hint, False


def switch_words(hint: Any) -> tuple[str, ...] | None:
    """What a switch may be besides true and false: of ``bool | Literal["auto"]`` that; None for no switch."""
    inner = strip_optional(hint)[0]
    parts = get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (inner,)
    if bool not in parts:
        return None
    return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


def _is_optional(hint: Any) -> bool:
    return strip_optional(hint)[1]


def _is_list(hint: Any) -> bool:
    return get_origin(strip_optional(hint)[0]) is list


def _read_list(text: str) -> list[Any]:
    """``a,b``, ``a b``, ``"a, b"`` or TOML's own ``["a", "b"]``; empty text is an empty list."""
    if text.lstrip().startswith("["):
        try:
            return typing.cast("list[Any]", tomli.loads(f"value = {text}")["value"])
        except tomli.TOMLDecodeError:
            raise BadValueError(f"got {show(text)}; allowed: a,b or a TOML list") from None
    return [entry for entry in re.split(r"[,\s]+", text) if entry]


def _read_bool(text: str, hint: Any) -> bool:
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise BadValueError(f"got {text!r}; allowed: {describe(strip_optional(hint)[0])}")
    return word in TRUE_WORDS


def _check_choice(value: Any, hint: Any, inner: Any) -> Any:
    choices = get_args(inner)
    if value in choices and isinstance(value, type(choices[0])):
        return value
    message = f"got {show(value)}; allowed: {describe(hint)}"
    if isinstance(value, str) and len(choices) > 2:
        message += f" (nearest: {nearest(value, [str(choice) for choice in choices])!r})"
    raise BadValueError(message)


def _check_bounds(value: Any, hint: Any, bounds: Mapping[str, float]) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    outside = (
        ("min" in bounds and value < bounds["min"])
        or ("max" in bounds and value > bounds["max"])
        or ("above" in bounds and value <= bounds["above"])
        or ("below" in bounds and value >= bounds["below"])
    )
    if outside:
        raise BadValueError(f"got {value}; allowed: {describe(hint, bounds)}")
