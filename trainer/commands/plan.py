"""`octavo plan`: what a run will need, on any machine and in seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.config import help_requested, print_help
from trainer.commands.words import CommandWords, read_words
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

_OPTIONS = ("--world-size", "--device", "--png")


def main(argv: Sequence[str]) -> int:
    """Print the plan; exit code 2 where the configuration cannot run."""
    if help_requested(argv):
        print_help(USAGE.format(devices=" ".join(device.key for device in DEVICES)))
        return 0
    words = read_words(argv, _OPTIONS, ("--json",))
    try:
        loaded, plan = _loaded_and_planned(words)
    except ConfigError as error:
        print(ConfigError([*words.problems, *error.problems]), file=sys.stderr)
        return EXIT_BAD_INPUT
    from trainer.plan.picture import draw
    from trainer.plan.render import as_json, as_text

    print(as_json(plan) + "\n" if "--json" in words.switches else as_text(plan), end="")
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


def _loaded_and_planned(words: CommandWords) -> tuple[Loaded, Plan]:
    loaded = load(words.rest)
    from trainer.plan.plan import default_world_size, make_plan  # torch: a misspelt key need not wait for it

    world_size, device = words.count("--world-size", default_world_size()), _device(words)
    plan = make_plan(loaded, world_size, device)
    if words.problems:
        raise ConfigError([])
    return loaded, plan


def _device(words: CommandWords) -> Device:
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
