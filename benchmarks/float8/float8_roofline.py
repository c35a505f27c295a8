"""Where float8 pays: modelled and, on a GPU, measured times of linears, forward + backward.

    python benchmarks/float8/float8_roofline.py OUT.csv --shape_gen_name sweep --device h100
    ... OUT.csv --shape_gen_name custom --M 8192 --K 4096 --N 1024,4096
    ... OUT.csv --model llama3 --flavor 8B

writes OUT.csv, OUT.md and OUT.png: a row a shape; grids of speedups (K down, N across, one for each M) or
bars; and for a model the roll-up that says which linears to convert.

The model is converters/float8/cost.py: three GEMMs bound by arithmetic or memory, plus the casts' bytes.
Ceilings are those of the device table, or measured on the spot (``--ceilings measured``, and for a GPU that
the table does not know). ``--gemm_time_strategy benchmarks`` takes GEMM times from this GPU and models the
casts alone. On the modelled GPU itself, the whole linear is measured too, compiled, for at most
``--measure_seconds``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.float8.hosts import ceilings_of, device_name, measured_device, named_row, present_row
from benchmarks.float8.matmuls import (
    BF16,
    ROWWISE,
    ROWWISE_FAST,
    TENSORWISE,
    TENSORWISE_FAST,
    matmul_seconds,
    measured_ceilings,
)
from benchmarks.float8.roofline_report import FLOAT8, Row, write_report
from benchmarks.float8.sizes import generate, model_linears, read_sizes
from converters.float8.config import Float8LinearConfig, Float8LinearRecipeName
from converters.float8.cost import Casts, Ceilings, LinearCost, gemms, in_float8, linear_cost
from trainer.calibration.linears import (
    PLAIN,
    Shape,
    float8_linear,
    is_out_of_memory,
    plain_linear,
    time_linears,
)
from trainer.calibration.shapes import ModelLinears
from trainer.config.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Model, measure and write; exit code 2 where the request cannot be met."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("output", type=Path, metavar="OUT.csv")
    add(
        "--shape_gen_name",
        choices=("sweep", "pow2", "llama", "custom"),
        help="default: sweep, without --model",
    )
    for size in "MKN":
        add(f"--{size}", type=read_sizes, metavar="INT[,INT...]")
    add("--model", help="a model whose linears are rolled up, for example llama3")
    add("--flavor", default="8B")
    add("--tokens", type=int, default=8192, help="M of the model's linears (default 8192)")
    add("--tensor_parallel", type=int, default=1, help="degree that cuts the model's linears")
    recipes = [recipe.value for recipe in Float8LinearRecipeName]
    add("--float8_recipe_name", choices=recipes, default="tensorwise")
    add("--gemm_time_strategy", choices=("roofline", "benchmarks"), default="roofline")
    fusion = "amaxes in the producers' kernels, both layouts in one pass"
    add("--enable_fusion_modeling", action="store_true", help=fusion)
    add(
        "--device",
        help="a row of the device table, for example h100, a100, b200 (default: this machine's GPU)",
    )
    add("--ceilings", choices=("table", "measured"), help="default: table, where it knows the device")
    add("--no_measure", action="store_true", help="model only, also on a GPU")
    add("--measure_seconds", type=float, default=480.0, help="measure no further shape after this long")
    add("--repetitions", type=int, default=20)
    add("--n_limit", type=int, help="only the first shapes")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.output.suffix != ".csv":
        raise ValueError(f"OUT is {options.output}: name it {options.output.stem}.csv")
    recipe = Float8LinearRecipeName(options.float8_recipe_name)
    linears = _model_linears(options)
    name = options.shape_gen_name or (None if options.model else "sweep")
    shapes = generate(name, options.M, options.K, options.N)[: options.n_limit] if name else []
    if not name and (options.M or options.K or options.N):
        raise ValueError("--M, --K and --N have no effect without --shape_gen_name custom or sweep")
    shapes = list(dict.fromkeys([*shapes, *(row.shape for row in linears)]))
    device, ceilings, subject = _subject(options, recipe)
    print(f"{subject}; {len(shapes)} shapes", file=sys.stderr, flush=True)
    rows = _model(shapes, recipe, ceilings, device, options)
    if device is not None and not options.no_measure and ceilings.float8_flops:
        rows = _measure(rows, recipe, device, options)
    write_report(rows, linears, recipe, subject, options)
    return 0


def _model_linears(options: argparse.Namespace) -> list[ModelLinears]:
    if options.model is None:
        return []
    return model_linears(options.model, options.flavor, options.tokens, options.tensor_parallel)


def _subject(
    options: argparse.Namespace, recipe: Float8LinearRecipeName
) -> tuple[torch.device | None, Ceilings, str]:
    """The device to measure on (None where the modelled one is not here), its ceilings, and its name."""
    present = present_row()
    named = None if options.device is None else named_row(options.device)
    here = torch.cuda.is_available() and (named is None or named == present)
    if not here and named is None:
        raise ValueError("this machine has no GPU to model: name one, for example --device h100")
    on_the_spot = options.ceilings == "measured" or options.gemm_time_strategy == "benchmarks"
    if on_the_spot and not here:
        what = "--ceilings measured" if options.ceilings == "measured" else "--gemm_time_strategy benchmarks"
        raise ValueError(
            f"{what} needs the GPU in this machine" + (f", which is no {named.key}" if named else "")
        )
    device = measured_device("cuda") if here else None
    row = named or present
    if device is not None and (row is None or row.gemm_bf16_tflops is None or options.ceilings == "measured"):
        ceilings, source = measured_ceilings(device), "ceilings measured on the spot"
    else:
        assert row is not None
        ceilings = ceilings_of(row)
        if recipe is not Float8LinearRecipeName.TENSORWISE and not row.float8_rows:
            ceilings = replace(ceilings, float8_flops=0.0)  # its float8 GEMMs take no scale per row
        source = f"ceilings of {row.key}: " + (
            "measured" if row.measured else "estimated from the data sheet"
        )
    name = device_name(device) if device is not None else f"{row.key if row else ''} (modelled)"
    rates = f"bf16 {ceilings.bf16_flops / 1e12:,.0f}, float8 {ceilings.float8_flops / 1e12:,.0f} TFLOP/s"
    return device, ceilings, f"{name}, {source}: {rates}, memory {ceilings.bytes_per_second / 1e12:.2f} TB/s"


def _model(
    shapes: Sequence[Shape],
    recipe: Float8LinearRecipeName,
    ceilings: Ceilings,
    device: torch.device | None,
    options: argparse.Namespace,
) -> list[Row]:
    rows = []
    casts: Casts = "fused" if options.enable_fusion_modeling else "compiled"
    for shape in shapes:
        # A float8 rate of 0 stands for a device without float8 GEMMs.
        known = ceilings if ceilings.float8_flops else replace(ceilings, float8_flops=1.0)
        cost = linear_cost(recipe, *shape, known, casts=casts)
        if options.gemm_time_strategy == "benchmarks":
            assert device is not None
            cost = _timed_gemms(shape, recipe, device, cost, options.repetitions)
        rows.append(Row(shape, cost, bool(ceilings.float8_flops)))
    return rows


def _timed_gemms(
    shape: Shape, recipe: Float8LinearRecipeName, device: torch.device, cost: LinearCost, repetitions: int
) -> LinearCost:
    """The same casts, with GEMM times of this GPU; fast accumulation in the output alone, as recipes do."""
    rowwise = recipe is not Float8LinearRecipeName.TENSORWISE
    slow, fast = (ROWWISE, ROWWISE_FAST) if rowwise else (TENSORWISE, TENSORWISE_FAST)
    plain = converted = 0.0
    for gemm, size in gemms(*shape).items():
        bf16 = matmul_seconds(BF16, *size, device, repetitions)
        kind = fast if gemm == "output" else slow
        plain += bf16
        has = in_float8(recipe, gemm) and kind.missing(device) is None
        converted += matmul_seconds(kind, *size, device, repetitions) if has else bf16
    return LinearCost(plain, converted, cost.cast_seconds)


def _measure(
    rows: Sequence[Row], recipe: Float8LinearRecipeName, device: torch.device, options: argparse.Namespace
) -> list[Row]:
    """Forward + backward of the linears themselves, compiled, until the time is up."""
    config = Float8LinearConfig.from_recipe_name(recipe)
    began, found = time.monotonic(), list(rows)
    for number, row in enumerate(rows):
        if time.monotonic() - began > options.measure_seconds:
            print(
                f"measured {number} of {len(rows)} shapes in {options.measure_seconds:.0f} s", file=sys.stderr
            )
            break
        if row.shape.k % 16 or row.shape.n % 16:
            continue
        try:
            modules = {
                PLAIN: plain_linear(row.shape, device, torch.bfloat16),
                FLOAT8: float8_linear(row.shape, device, torch.bfloat16, config),
            }
            times = time_linears(
                modules,
                row.shape,
                device,
                torch.bfloat16,
                compiled=(FLOAT8,),
                repetitions=options.repetitions,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"{tuple(row.shape)}: out of memory, not measured", file=sys.stderr)
            continue
        found[number] = Row(row.shape, row.cost, row.has_float8, times)
        print(f"measured {tuple(row.shape)}: {found[number].speedup:.2f}x", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
