"""Load a JobConfig: defaults < TOML file with what it extends < command line. Torch-free.

Strict: a name that matches nothing, a wrong type, a value out of bounds is a problem, and all problems are
reported at once. The result knows where every value came from, so `octavo config` can show it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from models import MODELS
from trainer.config import values
from trainer.config.aliases import ALIASES, RETIRED, rename
from trainer.config.command_line import read_command_line
from trainer.config.errors import ConfigError, Problem, nearest, unknown
from trainer.config.extensions import merge_custom_tables
from trainer.config.job import JobConfig
from trainer.config.schema import OVERRIDES, Schema, build, merge_types, read_schema, with_overrides
from trainer.config.settings import Layer, Setting, Words
from trainer.config.toml_file import read_layers

DEFAULT_ORIGIN = "default"
_CONFIG_FILE = "job.config_file"


@dataclass
class Loaded:
    """A configuration and its history."""

    config: JobConfig
    schema: Schema
    values: Mapping[str, Any]
    """Every key -> its value."""
    origins: Mapping[str, str]
    """Every key -> ``default``, ``file:line`` or the flag."""
    notes: list[str] = field(default_factory=list)
    """What the user should know: old names, repeated flags, lists added to."""

    def given(self, key: str) -> bool:
        """True where the user set `key`, whatever the value."""
        return self.origins[key] != DEFAULT_ORIGIN

    def problem(self, key: str, message: str) -> Problem:
        """A problem with `key`, located where it was set."""
        origin = self.origins.get(key, DEFAULT_ORIGIN)
        flag = f"--{key}"
        where = key if origin in (DEFAULT_ORIGIN, flag) else f"{origin}: {key}"
        return Problem(flag if origin == flag else where, message)


def load(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Loaded:
    """Read the configuration that `argv` (and CONFIG_FILE in `env`) describes.

    Raises:
        ConfigError: with every problem of names, types and values found.
    """
    env = os.environ if env is None else env
    flags = read_command_line(argv)
    layers = [*_file_layers(flags, env), flags]
    schema = _base_schema(layers)
    merge_custom_tables(_raw(layers, "experimental.custom_import"))
    loader = _Loader(schema)
    return loader.run(layers, env)


class _Loader:
    """Applies layers to a schema and collects what is wrong."""

    def __init__(self, schema: Schema):
        self.schema = schema
        self.values: dict[str, Any] = {name: key.default for name, key in schema.keys.items()}
        self.origins: dict[str, str] = dict.fromkeys(schema.keys, DEFAULT_ORIGIN)
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def run(self, layers: Sequence[Layer], env: Mapping[str, str]) -> Loaded:
        self._open_overrides(layers)
        for layer in layers:
            self._apply(layer)
        if env.get("CONFIG_FILE") and self.origins[_CONFIG_FILE] == DEFAULT_ORIGIN:
            self.values[_CONFIG_FILE], self.origins[_CONFIG_FILE] = env["CONFIG_FILE"], "CONFIG_FILE"
        # Overrides that nobody set are not overrides: only the given ones go into the config.
        given = {
            name: value
            for name, value in self.values.items()
            if not (name.startswith(f"{OVERRIDES}.") and self.origins[name] == DEFAULT_ORIGIN)
        }
        config = build(self.schema.sections[""], given)
        loaded = Loaded(config, self.schema, given, {name: self.origins[name] for name in given}, self.notes)
        self._check_sections(loaded)
        if self.problems:
            raise ConfigError(self.problems)
        return loaded

    def _open_overrides(self, layers: Sequence[Layer]) -> None:
        """Make the fields of the chosen flavor known as keys, so that overrides are checked like the rest."""
        name = _raw(layers, "model.name") or self.values["model.name"]
        flavor = _raw(layers, "model.flavor") or self.values["model.flavor"]
        spec = MODELS.get(name) or next(iter(MODELS.values()))
        sample = spec.flavors.get(flavor) or next(iter(spec.flavors.values()))
        self.schema = with_overrides(self.schema, sample)
        for key in self.schema.keys.values():
            if key.name not in self.values:
                self.values[key.name], self.origins[key.name] = key.default, DEFAULT_ORIGIN

    def _apply(self, layer: Layer) -> None:
        self.problems.extend(layer.problems)
        for section, where in layer.sections:
            self._check_section_name(section, where)
        seen: dict[str, tuple[Setting, Any]] = {}
        for setting in layer.settings:
            key = self._resolve(setting, layer)
            if key is None:
                continue
            try:
                value = self._convert(key, setting)
            except values.BadValueError as error:
                shown = f"{setting.where}: {key}" if ":" in setting.where else setting.where
                self.problems.append(Problem(shown, str(error)))
                continue
            if key in seen:
                self._compare(key, setting, value, *seen[key])
            seen[key] = (setting, value)
            self.values[key], self.origins[key] = value, setting.where

    def _resolve(self, setting: Setting, layer: Layer) -> str | None:
        """The present name of a setting's key, or None (with a problem) when there is no such key."""
        key = rename(setting.key)
        if key in self.schema.keys:
            if key != setting.key:
                self.notes.append(f"{setting.where}: {setting.key} is the older name of {key}")
            return key
        if key in RETIRED:
            allowed, message = RETIRED[key]
            if _plain(setting.value) != allowed:
                self.problems.append(Problem(f"{setting.where}: {key}", message))
            return None
        if any(
            where_key == setting.key or setting.key.startswith(f"{where_key}.")
            for where_key in _bad(layer, self)
        ):
            return None  # its section is unknown and was reported
        if key and key in self.schema.sections:
            message = f"{key} is a section; give one of its keys, --{next(self._keys_of(key))} say"
        else:
            message = unknown("key", setting.key, self._candidates(key), list_all=False)
        self.problems.append(Problem(setting.where, message))
        return None

    def _convert(self, key: str, setting: Setting) -> Any:
        spec, given = self.schema.keys[key], setting.value
        if not isinstance(given, Words):
            return values.from_toml(given, spec.type, spec.bounds)
        is_bool = values.switch_words(spec.type) is not None
        if given.negated and not is_bool:
            raise values.BadValueError(
                f"got --no-...; {key} is not a switch: {values.describe(spec.type, spec.bounds)}"
            )
        if is_bool and not given.words:
            return not given.negated
        value = values.from_words(given.words, spec.type, spec.bounds)
        if given.negated:
            if not isinstance(value, bool):
                raise values.BadValueError(
                    f"got --no-...={value}; allowed: --no-..., or the key and {value!r}"
                )
            return not value
        if get_origin(values.strip_optional(spec.type)[0]) is list:
            return self._merge_list(key, value, given.append)
        if given.append:
            raise values.BadValueError(f"+= adds to a list; {key} is {values.describe(spec.type)}")
        return value

    def _merge_list(self, key: str, value: list[Any], append: bool) -> list[Any]:
        below, origin = self.values[key] or [], self.origins[key]
        if append:
            self.notes.append(f"--{key}+=: added to the {len(below)} of {origin}")
            return [*below, *value]
        if origin != DEFAULT_ORIGIN and ":" in origin and value != below:
            self.notes.append(f"--{key}: replaces the list of {origin}")
        return value

    def _compare(self, key: str, setting: Setting, value: Any, before: Setting, earlier: Any) -> None:
        """The same key twice in one layer: old and new name must agree; a repeated flag overrides."""
        if isinstance(setting.value, Words) and setting.value.append:
            return
        if before.key != setting.key:
            if value != earlier:
                message = f"is set to {earlier!r} as {before.key} and to {value!r} as {setting.key}; keep one"
                self.problems.append(Problem(f"{before.where}, {setting.where}", f"{key} {message}"))
        elif value != earlier and key != _CONFIG_FILE:
            self.notes.append(f"{setting.where} was given twice; the last one ({value!r}) holds")

    def _check_section_name(self, section: str, where: str) -> None:
        name = rename(section)
        if _known_section(name, self.schema) or name in self.schema.keys:
            if name in self.schema.keys:
                hint = values.describe(self.schema.keys[name].type)
                self.problems.append(Problem(where, f"{name} is a key, not a section; allowed: {hint}"))
            return
        parent = section.rpartition(".")[0]
        if parent and not _known_section(rename(parent), self.schema):
            return  # the outer name is the mistake, and was reported
        names = [name for name in self.schema.sections if name]
        old = [name for name in ALIASES if "." not in name]
        self.problems.append(Problem(where, unknown("section", section, [*names, *old], list_all=False)))

    def _check_sections(self, loaded: Loaded) -> None:
        """Ask each section's own `problems()`."""
        for path in self.schema.sections:
            section: Any = loaded.config
            for part in path.split(".") if path else []:
                section = section[part] if isinstance(section, dict) else getattr(section, part)
            if path and hasattr(section, "problems"):
                for name, message in section.problems():
                    self.problems.append(loaded.problem(f"{path}.{name}", message))

    def _candidates(self, key: str) -> list[str]:
        """Names to compare a misspelt key with: its own section first, everything otherwise."""
        section, _, leaf = key.rpartition(".")
        own = [name for name in self.schema.keys if name.rpartition(".")[0] == section]
        everywhere = list(self.schema.keys)
        exact = [name for name in everywhere if name.rpartition(".")[2] == leaf]
        if exact:
            return exact
        if own and (guess := nearest(leaf, [name.rpartition(".")[2] for name in own])):
            from difflib import SequenceMatcher

            if SequenceMatcher(None, leaf, guess).ratio() >= 0.6:
                return own
        return everywhere

    def _keys_of(self, section: str) -> Any:
        return (name for name in self.schema.keys if name.startswith(f"{section}."))


def _known_section(name: str, schema: Schema) -> bool:
    return any(path == name or path.startswith(f"{name}.") for path in schema.sections if path)


def _bad(layer: Layer, loader: _Loader) -> list[str]:
    """Sections of `layer` that do not exist (reported once, so their keys need not be)."""
    return [name for name, _ in layer.sections if not _known_section(rename(name), loader.schema)]


def _file_layers(flags: Layer, env: Mapping[str, str]) -> list[Layer]:
    path = _raw([flags], _CONFIG_FILE) or env.get("CONFIG_FILE")
    return read_layers(Path(path)) if path else []


def _base_schema(layers: Sequence[Layer]) -> Schema:
    """The schema of the built-in JobConfig, or of it merged with the user's own."""
    config_type: type = JobConfig
    module_name = _raw(layers, "job.custom_config_module") or _raw(layers, "experimental.custom_args_module")
    if module_name:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(
                [Problem("job.custom_config_module", f"cannot import {module_name!r}: {error}")]
            ) from None
        if not isinstance(getattr(module, "JobConfig", None), type):
            message = f"module {module_name!r} has no dataclass named JobConfig"
            raise ConfigError([Problem("job.custom_config_module", message)])
        config_type = merge_types(JobConfig, module.JobConfig)
    schema = read_schema(config_type)
    return Schema(schema.keys, {"": config_type, **schema.sections})


def _raw(layers: Sequence[Layer], key: str) -> str | None:
    """The last string set for `key`, before any checking (needed to know what to check against)."""
    found = None
    for layer in layers:
        for setting in layer.settings:
            if rename(setting.key) == key or setting.key == key:
                found = _plain(setting.value)
    return found if isinstance(found, str) and found else None


def _plain(value: Any) -> Any:
    if isinstance(value, Words):
        text = " ".join(value.words)
        return {"": not value.negated, "true": True, "false": False}.get(text.lower(), text)
    return value
