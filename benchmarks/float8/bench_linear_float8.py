"""Forward + backward of one linear: bf16, Octavo's float8, and torchao's where it is installed.

    python benchmarks/float8/bench_linear_float8.py -o OUT.txt --compile
    ... --compile --shapes 8192,4096,1024 --recipes rowwise --also round_scales_to_power_of_2=false

The weight is bf16, as FSDP gathers it. GPU time: medians of CUDA-event times, the L2 cache cold, the host
not in them, variants in turns (trainer/calibration/timing.py says how). ``--set`` changes a field of
Float8LinearConfig for all of Octavo's rows; ``--also`` adds a row with changed fields beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.float8.hosts import device_name, measured_device
from benchmarks.float8.sizes import LINEARS, read_shape
from benchmarks.float8.tables import Table, host_lines
from converters.float8.config import Float8LinearConfig, Float8LinearRecipeName, recipe_fields
from trainer.calibration.linears import (
    PLAIN,
    Shape,
    float8_linear,
    forget_compiled,
    forward_and_backward,
    make_operands,
    plain_linear,
)
from trainer.calibration.timing import Times, time_in_turns
from trainer.config.errors import unknown

RECIPES = [recipe.value for recipe in Float8LinearRecipeName]
HEADER = ("M", "K", "N", "linear", "us", "10 to 90 %", "TFLOP/s", "x bf16", "x torchao")
TORCHAO = "torchao"


@dataclass(frozen=True)
class Variant:
    """One linear that is timed."""

    name: str
    recipe: str
    config: Float8LinearConfig | None
    """Octavo's; None for torchao's."""

    def build(self, shape: Shape, device: torch.device) -> nn.Module:
        """The module, with the weights of all others.

        Raises:
            ValueError: the device or the shape does not allow it.
        """
        if self.config is not None:
            return float8_linear(shape, device, torch.bfloat16, self.config)
        from torchao.float8 import Float8LinearConfig as PeerConfig
        from torchao.float8 import convert_to_float8_training

        holder = nn.Sequential(plain_linear(shape, device, torch.bfloat16))
        return convert_to_float8_training(holder, config=PeerConfig.from_recipe_name(self.recipe))[0]


def read_settings(text: str) -> dict[str, Any]:
    """``field=value,field=value`` of Float8LinearConfig.

    Raises:
        argparse.ArgumentTypeError: no field has that name.
    """
    names = [item.name for item in fields(Float8LinearConfig)]
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value:
            raise argparse.ArgumentTypeError(f"got {part!r}; expected field=value")
        if name not in names:
            raise argparse.ArgumentTypeError(
                unknown("field of Float8LinearConfig", name, names, list_all=False)
            )
        words: dict[str, Any] = {"true": True, "false": False}
        found[name] = words.get(value.lower(), int(value) if value.isdecimal() else value)
    return found


def variants(
    recipes: Sequence[str], settings: Mapping[str, Any], also: Sequence[Mapping[str, Any]], *, torchao: bool
) -> list[Variant]:
    """The float8 linears to time, in the order of the table's rows.

    Raises:
        ValueError: settings that cannot work with a recipe.
    """
    found = []
    for recipe in recipes:
        for extra in ({}, *also):
            changed = {**settings, **extra}
            shown = ", ".join(f"{name}={value}" for name, value in changed.items())
            name = f"octavo {recipe}" + (f" ({shown})" if shown else "")
            found.append(Variant(name, recipe, Float8LinearConfig(**{**recipe_fields(recipe), **changed})))
        if torchao:
            found.append(Variant(f"{TORCHAO} {recipe}", recipe, None))
    return found


def measure(
    shape: Shape, chosen: Sequence[Variant], device: torch.device, *, compiled: bool, repetitions: int
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of all variants of one shape by name, and why others have none.

    Each runs once before any is timed: one that fails must not cost the others their times.
    """
    forget_compiled()
    operands = make_operands(shape, device, torch.bfloat16)
    plain = plain_linear(shape, device, torch.bfloat16)
    works = {PLAIN: forward_and_backward(plain, operands, compiled=compiled)}
    failed: dict[str, str] = {}
    for variant in chosen:
        try:
            work = forward_and_backward(variant.build(shape, device), operands, compiled=compiled)
            work()
            works[variant.name] = work
        except Exception as error:  # of a compiler or a peer: any kind; the row says which
            failed[variant.name] = f"{type(error).__name__}: {_first_line(error)}"
    return time_in_turns(works, device, repetitions), failed


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:80] if lines else "no message"


def rows_of(
    shape: Shape, chosen: Sequence[Variant], times: Mapping[str, Times], failed: Mapping[str, str]
) -> list[list[str]]:
    """The table's rows of one shape."""
    sizes = [str(size) for size in shape]
    rows = [_row(sizes, "bf16", times[PLAIN], shape, times[PLAIN], None)]
    for variant in chosen:
        if variant.name in failed:
            rows.append([*sizes, variant.name, f"failed: {failed[variant.name]}", "", "", "", ""])
            continue
        peer = times.get(f"{TORCHAO} {variant.recipe}")
        rows.append(_row(sizes, variant.name, times[variant.name], shape, times[PLAIN], peer))
    return rows


def _row(
    sizes: list[str], name: str, found: Times, shape: Shape, bf16: Times, peer: Times | None
) -> list[str]:
    tflops = shape.flops / found.median / 1e12
    return [
        *sizes,
        name,
        f"{1e6 * found.median:,.1f}",
        f"{1e6 * found.low:,.1f} to {1e6 * found.high:,.1f}",
        f"{tflops:,.1f}" if tflops >= 1 else f"{tflops:.3g}",
        f"{bf16.median / found.median:.2f}",
        "" if peer is None else f"{peer.median / found.median:.2f}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 2 where this machine cannot, 1 where a variant failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="write the table as text, and as CSV beside it")
    parser.add_argument("--compile", action="store_true", help="compile every variant, as runs do")
    parser.add_argument("--shapes", type=read_shape, nargs="+", default=list(LINEARS), metavar="M,K,N")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["tensorwise", "rowwise"])
    parser.add_argument("--set", type=read_settings, action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--also", type=read_settings, action="append", default=[], metavar="FIELD=VALUE,...")
    parser.add_argument("--no_torchao", action="store_true", help="leave torchao out though it is installed")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    settings = {name: value for given in options.set for name, value in given.items()}
    torchao = not options.no_torchao and importlib.util.find_spec("torchao") is not None
    try:
        device = measured_device(options.device)
        chosen = variants(options.recipes, settings, options.also, torchao=torchao)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(HEADER, right=(0, 1, 2, 4, 5, 6, 7, 8))
    head = [*host_lines(device_name(device)), "forward + backward, " + _how(options.compile)]
    print("\n".join(head), flush=True)
    any_failed = False
    for shape in options.shapes:
        times, failed = measure(
            shape, chosen, device, compiled=options.compile, repetitions=options.repetitions
        )
        any_failed = any_failed or bool(failed)
        table.rows += rows_of(shape, chosen, times, failed)
        print(f"timed {tuple(shape)}", file=sys.stderr, flush=True)
        if options.output is not None:  # after each shape: what is measured is kept if the next one fails
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join([*head, "", table.text()]) + "\n")
            table.write_csv(options.output.with_suffix(".csv"))
    print(f"\n{table.text()}")
    return 1 if any_failed else 0


def _how(compiled: bool) -> str:
    return "compiled" if compiled else "eager: float8 casts are then several kernels each; use --compile"


if __name__ == "__main__":
    sys.exit(main())
