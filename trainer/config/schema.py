"""The keys of the configuration, read off the dataclasses: name, type, default, bounds, description.

A *section* is a dataclass field whose type is a dataclass; everything else is a *key*, named by its
dotted path (``training.dataloader.num_workers``). `model.overrides` is the one open section: its keys
are the fields of the chosen model's config type (`with_overrides`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

OVERRIDES = "model.overrides"


@dataclass(frozen=True)
class Key:
    """One configuration key."""

    name: str
    type: Any
    default: Any
    bounds: Mapping[str, float]
    owner: Any
    """The dataclass that declares it."""

    @property
    def section(self) -> str:
        """Dotted path of the section it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def doc(self) -> str:
        """Its description: the string below the field."""
        return field_docs(self.owner).get(self.name.rpartition(".")[2], "")


@dataclass(frozen=True)
class Schema:
    """All keys and all section paths of a config type."""

    keys: Mapping[str, Key]
    sections: Mapping[str, type]


def read_schema(config_type: type) -> Schema:
    """Collect the keys of `config_type` and everything nested in it."""
    keys: dict[str, Key] = {}
    sections: dict[str, type] = {}
    _collect(config_type, "", keys, sections)
    return Schema(keys, sections)


def with_overrides(schema: Schema, flavor: Any) -> Schema:
    """`schema` with the fields of a flavor's config as keys below ``model.overrides``."""
    keys = dict(schema.keys)
    hints = field_types(type(flavor))  # type: ignore[arg-type]
    for item in dataclasses.fields(flavor):
        name = f"{OVERRIDES}.{item.name}"
        keys[name] = Key(name, hints[item.name], getattr(flavor, item.name), item.metadata, type(flavor))
    return Schema(keys, {**schema.sections, OVERRIDES: type(flavor)})


def build(config_type: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Make `config_type` from a flat mapping of dotted keys; absent keys keep their defaults."""
    arguments: dict[str, Any] = {}
    hints = field_types(config_type)
    for item in dataclasses.fields(config_type):
        name = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            arguments[item.name] = build(hints[item.name], values, f"{name}.")
        elif name == OVERRIDES:
            start = f"{name}."
            arguments[item.name] = {k[len(start) :]: v for k, v in values.items() if k.startswith(start)}
        elif name in values:
            arguments[item.name] = values[name]
    return config_type(**arguments)


def merge_types(base: type, extra: type) -> type:
    """A dataclass with the fields of both, section by section; `extra`'s defaults win.

    This is what `job.custom_config_module` does: a user's JobConfig adds keys and sections, or changes
    defaults, without copying the built-in one.
    """
    base_hints, extra_hints = field_types(base), field_types(extra)
    base_fields = {item.name: item for item in dataclasses.fields(base)}
    extra_fields = {item.name: item for item in dataclasses.fields(extra)}
    merged: list[tuple[str, Any, Any]] = []
    for name in [*base_fields, *(name for name in extra_fields if name not in base_fields)]:
        hint = extra_hints.get(name, base_hints.get(name))
        source = extra_fields.get(name, base_fields.get(name))
        if name in base_fields and name in extra_fields and dataclasses.is_dataclass(base_hints[name]):
            hint = merge_types(base_hints[name], extra_hints[name])
            merged.append((name, hint, dataclasses.field(default_factory=hint)))
        else:
            merged.append((name, hint, _same_field(typing.cast("dataclasses.Field[Any]", source))))
    namespace = {"__doc__": base.__doc__, "__octavo_parts__": (base, extra)}
    if hasattr(base, "problems"):
        namespace["problems"] = base.problems
    return dataclasses.make_dataclass(base.__name__, merged, namespace=namespace, frozen=True)


@functools.cache
def field_types(config_type: Any) -> dict[str, Any]:
    """Field name -> resolved type."""
    return typing.get_type_hints(config_type)


@functools.cache
def field_docs(config_type: Any) -> dict[str, str]:
    """Field name -> the string literal below the field in the class's source."""
    docs: dict[str, str] = {}
    for part in getattr(config_type, "__octavo_parts__", ()):
        docs.update(field_docs(part))
    if docs:
        return docs
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(config_type)))
    except (OSError, TypeError):  # made in a REPL or by make_dataclass
        return {}
    body = typing.cast("ast.ClassDef", tree.body[0]).body
    for node, below in pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[node.target.id] = " ".join(below.value.value.split())
    return docs


def _collect(config_type: type, prefix: str, keys: dict[str, Key], sections: dict[str, type]) -> None:
    hints = field_types(config_type)
    for item in dataclasses.fields(config_type):
        name, hint = f"{prefix}{item.name}", hints[item.name]
        if dataclasses.is_dataclass(hint):
            sections[name] = typing.cast(type, hint)
            _collect(typing.cast(type, hint), f"{name}.", keys, sections)
        elif name == OVERRIDES:
            sections[name] = dict
        else:
            keys[name] = Key(name, hint, _default(item), item.metadata, config_type)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _same_field(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=item.default_factory, metadata=item.metadata)
    return dataclasses.field(default=item.default, metadata=item.metadata)
