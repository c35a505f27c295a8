"""Read a TOML file and everything it extends, as layers of settings that know their line.

``extends = "llama3_8b.toml"`` at the top of a file names another file, relative to this one, whose values
come first. Chains are allowed, circles are refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import tomli

from trainer.config.errors import ConfigError, Problem
from trainer.config.settings import Layer, Setting

EXTENDS = "extends"
_HEADER = re.compile(r"^\s*\[\[?\s*([^\]\[]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)


def read_layers(path: Path) -> list[Layer]:
    """Layers of `path`, the most basic file first.

    Raises:
        ConfigError: a file is missing, is not UTF-8, is not TOML, or extends itself.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        resolved = path.resolve()
        if resolved in seen:
            chain = " -> ".join(_shown(step) for step in [*seen, resolved])
            raise ConfigError([Problem(_shown(seen[-1]), f"extends goes round in a circle: {chain}")])
        seen.append(resolved)
        layer, base = _read_one(path)
        layers.insert(0, layer)
        if base is None:
            return layers
        path = path.parent / base


def _read_one(path: Path) -> tuple[Layer, str | None]:
    shown = _shown(path)
    try:
        text = path.read_bytes().decode("utf-8")
        data = tomli.loads(text)
    except OSError as error:
        raise ConfigError([Problem(shown, _why_unreadable(path, error))]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(shown, f"is not UTF-8 text (byte {error.start})")]) from None
    except tomli.TOMLDecodeError as error:
        raise ConfigError([Problem(shown, f"is not valid TOML: {error}")]) from None
    except RecursionError:
        raise ConfigError([Problem(shown, "is nested too deeply to be a config file")]) from None
    lines = key_lines(text)
    base = data.pop(EXTENDS, None)
    if base is not None and not isinstance(base, str):
        where = f"{shown}:{lines.get(EXTENDS, 1)}"
        raise ConfigError([Problem(where, "extends takes the name of one TOML file, as a string")])
    settings: list[Setting] = []
    sections: list[tuple[str, str]] = []
    _flatten(data, "", shown, lines, settings, sections)
    return Layer(shown, settings, sections), base


def key_lines(text: str) -> dict[str, int]:
    """Line number (from 1) of every section header and key of a valid TOML text.

    Multi-line strings and arrays are stepped over; a key inside an inline table has its table's line.
    """
    lines: dict[str, int] = {}
    section, open_quote, depth = "", "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not open_quote and depth == 0:
            if header := _HEADER.match(line):
                section = _dotted(header[1])
                lines.setdefault(section, number)
                continue
            if key := _KEY.match(line):
                lines.setdefault(f"{section}.{_dotted(key[1])}".lstrip("."), number)
                line = line[key.end() :]
        open_quote, depth = _still_open(line, open_quote, depth)
    return lines


def _still_open(line: str, quote: str, depth: int) -> tuple[str, int]:
    """Which multi-line string and how many brackets are open after `line`."""
    index = 0
    while index < len(line):
        if quote:
            if quote == '"""' and line[index] == "\\":
                index += 2
                continue
            if line.startswith(quote, index):
                index += len(quote)
                quote = ""
                continue
        elif line.startswith(('"""', "'''"), index):
            quote = line[index : index + 3]
            index += 3
            continue
        elif line[index] in "\"'":
            index = _skip_string(line, index)
            continue
        elif line[index] == "#":
            break
        else:
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(line[index], 0)
        index += 1
    return quote, depth


def _skip_string(line: str, start: int) -> int:
    """Index after the one-line string that begins at `start`."""
    mark, index = line[start], start + 1
    while index < len(line) and line[index] != mark:
        index += 2 if mark == '"' and line[index] == "\\" else 1
    return index + 1


def _dotted(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _flatten(
    table: dict[str, Any],
    prefix: str,
    file: str,
    lines: dict[str, int],
    settings: list[Setting],
    sections: list[tuple[str, str]],
) -> None:
    for name, value in table.items():
        key = f"{prefix}{name}"
        line = lines.get(key) or lines.get(prefix.rstrip(".")) or 1
        where = f"{file}:{line}"
        if isinstance(value, dict):
            sections.append((key, where))
            _flatten(value, f"{key}.", file, lines, settings, sections)
        else:
            settings.append(Setting(key, value, where))


def _shown(path: Path) -> str:
    """A path as a user would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _why_unreadable(path: Path, error: OSError) -> str:
    if path.is_dir():
        return "is a folder; a TOML file is needed"
    if not path.exists():
        folder = path.parent
        found = (
            sorted(entry.name for entry in folder.glob("*.toml") if entry.name != "pyproject.toml")
            if folder.is_dir()
            else []
        )
        return "no such config file" + (f"; in that folder: {', '.join(found[:8])}" if found else "")
    return f"cannot be read: {error.strerror}"
