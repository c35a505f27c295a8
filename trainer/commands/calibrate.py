"""`octavo calibrate`: time the model's linears on this GPU in bf16 and float8, and say which to convert."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.commands.config import help_requested, print_help
from trainer.commands.words import CommandWords, read_words
from trainer.config.errors import EXIT_BAD_INPUT, ConfigError, Problem
from trainer.config.load import Loaded, load

USAGE = """\
usage: octavo calibrate [--world-size N] [--out FILE] [--section.key VALUE ...]
       (environment: CONFIG_FILE, NGPU, NNODES)

Times each distinct linear of the configured model on this machine's GPU, forward + backward, plain and in
float8 with the configured recipe, and says which to convert. Takes the flags that training takes; a run then
uses the result by quantize.linear.float8.calibration.

  --world-size N         processes of the run (default: NGPU x NNODES, else 1)
  --out FILE             write the result as JSON
  --minimum-speedup S    convert what is faster than this (default 1.0)
  --repetitions N        timed calls of each linear (default 30)
  --device cpu           time this machine's CPU instead: for debugging"""

_OPTIONS = ("--world-size", "--out", "--device", "--minimum-speedup", "--repetitions")
_FLOAT8 = "quantize.linear.float8"


def main(argv: Sequence[str]) -> int:
    """Print the table and write the file; exit code 2 where the configuration or the machine is not fit."""
    if help_requested(argv):
        print_help(USAGE)
        return 0
    words = read_words(argv, _OPTIONS)
    try:
        loaded = _load(words)
        return _calibrate(loaded, words)
    except ConfigError as error:
        print(ConfigError([*words.problems, *error.problems]), file=sys.stderr)
        return EXIT_BAD_INPUT


def _load(words: CommandWords) -> Loaded:
    """The configuration, with all that is wrong with the words and the machine beside it."""
    from trainer.launch import visible_gpus

    device, out = words.options.get("--device"), words.options.get("--out")
    if device not in (None, "cpu", "cuda"):
        words.problems.append(Problem("--device", f"got {device!r}; allowed: cuda, cpu"))
    elif device != "cpu" and visible_gpus(os.environ) == 0:
        message = (
            "octavo calibrate times this machine's GPU, and there is none.\n"
            "A run's report estimates without one; --device cpu times the CPU, for debugging"
        )
        words.problems.append(Problem("", message))
    if out is not None and not out.endswith(".json"):
        words.problems.append(Problem("--out", f"{out} is written as JSON: name it {out}.json"))
    _minimum_speedup(words)
    words.count("--repetitions", 30)
    loaded = load(words.rest)
    if loaded.config.quantize.linear.float8.emulate:
        message = "is for numerics: there is no float8 GEMM to time"
        words.problems.append(loaded.problem(f"{_FLOAT8}.emulate", message))
    if words.problems:
        raise ConfigError([])
    return loaded


def _minimum_speedup(words: CommandWords) -> float:
    text = words.options.get("--minimum-speedup", "1.0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        words.problems.append(Problem("--minimum-speedup", f"got {text!r}; allowed: a number above 0"))
    return value


def _calibrate(loaded: Loaded, words: CommandWords) -> int:
    import torch

    from kernels.support import runs_triton
    from trainer.calibration.calibrate import render, time_shapes, to_calibration
    from trainer.calibration.shapes import linears_of
    from trainer.config import checks
    from trainer.config.device_defaults import with_device_defaults
    from trainer.plan.layout import build_layout
    from trainer.plan.plan import default_world_size

    config = loaded.config
    world_size = words.count("--world-size", default_world_size())
    problems = [*words.problems, *checks.problems(loaded, world_size), *checks.unavailable(loaded)]
    kind = words.options.get("--device", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        problems.append(
            Problem("", "this machine has a GPU that torch cannot use: see its driver and torch's build")
        )
    if problems:
        words.problems.clear()
        raise ConfigError(problems)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "cpu"
    config = with_device_defaults(config, kernels=runs_triton(device), world_size=world_size)
    compiled = kind == "cuda" or (config.compile.enable and "model" in config.compile.components)
    found = linears_of(config, build_layout(config, world_size), kind)
    print(_title(config, name, compiled=compiled))
    timed = []
    options: dict[str, Any] = {"compiled": compiled, "minimum_speedup": _minimum_speedup(words)}
    for row in time_shapes(found, config, device, **options, repetitions=words.count("--repetitions", 30)):
        timed.append(row)
        sizes = ", ".join(map(str, row.linears.shape))
        print(f"timed {len(timed)} of {len(found)} shapes: ({sizes})", file=sys.stderr)
    print("\n".join(render(timed, _short(config.training.mixed_precision_param))))
    if kind == "cuda" and not config.compile.enable:
        print("note: timed compiled; with compile.enable off, as configured, float8 is slower than bf16")
    if "--out" in words.options:
        path = Path(words.options["--out"])
        to_calibration(timed, config, name, compiled=compiled).write(path)
        print(f"wrote {path}; use it: --{_FLOAT8}.calibration={path}")
    return 0


def _title(config: Any, device: str, *, compiled: bool) -> str:
    recipe = config.quantize.linear.float8.recipe_name or "tensorwise"
    how = "compiled" if compiled else "eager"
    text = f"{config.model.name} {config.model.flavor}, float8 {recipe} ({how}), on {device}"
    return text + (": for debugging, not for speed" if device == "cpu" else "")


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
