"""`octavo plan`: what a run will need, on any machine and in seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.config import help_requested, print_help
from trainer.config.errors import EXIT_BAD_INPUT, ConfigError, Problem, unknown
from trainer.config.load import Loaded, load
from trainer.config.preflight import input_problems
from trainer.metrics.devices import DEVICES, Device

if TYPE_CHECKING:
    from trainer.plan.plan import Plan

USAGE = """\
usage: octavo plan [--world-size N] [--device NAME] [--json] [--png FILE] [--section.key VALUE ...]
       (environment: CONFIG_FILE, NGPU, NNODES)

Plans a run without a GPU: shapes, memory, communication and time of each rank; everything that is wrong with
the configuration at once, with exit code 2.

  --world-size N   processes (default: NGPU x NNODES, else 1)
  --device NAME    {devices} (default: this machine's GPU, else h100)
  --json           the plan as JSON
  --png FILE       the memory as a picture, too"""

_OWN = {"--world-size", "--device", "--png"}


@dataclass
class _Words:
    """The command's own options, and what is left for the configuration."""

    options: dict[str, str] = field(default_factory=dict)
    as_json: bool = False
    rest: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Print the plan; exit code 2 where the configuration cannot run."""
    if help_requested(argv):
        print_help(USAGE.format(devices=" ".join(device.key for device in DEVICES)))
        return 0
    words = _read(argv)
    try:
        loaded, plan = _loaded_and_planned(words)
    except ConfigError as error:
        print(ConfigError([*words.problems, *error.problems]), file=sys.stderr)
        return EXIT_BAD_INPUT
    from trainer.plan.picture import draw
    from trainer.plan.render import as_json, as_text

    print(as_json(plan) if words.as_json else as_text(plan), end="\n" if words.as_json else "")
    for problem in input_problems(loaded):
        print(f"note: a run on this machine would stop here: {problem}", file=sys.stderr)
    if "--png" in words.options:
        try:
            draw(plan, Path(words.options["--png"]))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        print(f"wrote {words.options['--png']}", file=sys.stderr)
    return 0


def _loaded_and_planned(words: _Words) -> tuple[Loaded, Plan]:
    loaded = load(words.rest)
    from trainer.plan.plan import make_plan  # imports torch: a misspelt key need not wait for it

    world_size, device = _world_size(words), _device(words)
    plan = make_plan(loaded, world_size, device)
    if words.problems:
        raise ConfigError([])
    return loaded, plan


def _read(argv: Sequence[str]) -> _Words:
    words, left = _Words(), list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.replace("_", "-", 1 if word.startswith("--world_") else 0).partition("=")
        if word == "--json":
            words.as_json = True
        elif name in _OWN:
            if not equals and left:
                value = left.pop(0)
            if not value or value.startswith("--"):
                words.problems.append(Problem(name, "needs a value"))
            words.options[name] = value
        else:
            words.rest.append(word)
    return words


def _world_size(words: _Words) -> int:
    from trainer.plan.plan import default_world_size

    text = words.options.get("--world-size")
    if text is None:
        return default_world_size()
    if not text.isdecimal() or int(text) < 1:
        words.problems.append(Problem("--world-size", f"got {text!r}; allowed: an integer >= 1"))
        return 1
    return int(text)


def _device(words: _Words) -> Device:
    """The row that was named, else that of this machine's GPU, else an H100's."""
    from trainer.plan.plan import host_device

    rows = {device.key: device for device in DEVICES}
    name = words.options.get("--device")
    if name is None:
        return _own_device() or rows["h100"]
    if name == "cpu":
        return host_device()
    if name not in rows:
        words.problems.append(Problem("--device", unknown("device", name, rows, list_all=False)))
    return rows.get(name, rows["h100"])


def _own_device() -> Device | None:
    from trainer.launch import visible_gpus

    if visible_gpus(os.environ) == 0:
        return None
    import torch

    from trainer.metrics.devices import find_device

    return find_device(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
