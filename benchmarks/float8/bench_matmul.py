"""GEMM rates: bf16 and float8, tensorwise and rowwise, with and without fast accumulation.

    python benchmarks/float8/bench_matmul.py [--shapes M,K,N ...] [-o OUT.md]

prints microseconds, TFLOP/s and the share of the device's data-sheet peak for (M, K) @ (K, N). Medians of
CUDA-event times with a cold L2 cache (trainer/calibration/timing.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.float8.hosts import device_name, measured_device
from benchmarks.float8.matmuls import KINDS, Kind, matmul
from benchmarks.float8.sizes import LINEARS, read_shape
from benchmarks.float8.tables import Table, host_lines
from trainer.calibration.linears import Shape, is_out_of_memory
from trainer.calibration.timing import Times, time_in_turns
from trainer.metrics.devices import find_device

HEADER = ("M", "K", "N", "GEMM", "us", "10 to 90 %", "TFLOP/s", "of peak", "x bf16")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; exit code 2 where this machine cannot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=read_shape, nargs="+", default=list(LINEARS), metavar="M,K,N")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("-o", "--output", type=Path, help="write the table as Markdown, and as CSV beside it")
    options = parser.parse_args(argv)
    try:
        device = measured_device(options.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = device_name(device)
    table = Table(HEADER, right=(0, 1, 2, 4, 5, 6, 7, 8))
    for shape in options.shapes:
        works = {}
        missing = {kind.name: kind.missing(device) for kind in KINDS}
        try:
            for kind in KINDS:
                if missing[kind.name] is None:
                    works[kind.name] = matmul(kind, *shape, device)
            times = time_in_turns(works, device, options.repetitions)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            times, missing = {}, dict.fromkeys(missing, "out of memory")
        table.rows += [_row(shape, kind, times, missing[kind.name], name) for kind in KINDS]
    head = host_lines(name)
    print("\n".join([*head, "", table.text()]))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n\n".join(["  \n".join(head), table.markdown()]) + "\n")
        table.write_csv(options.output.with_suffix(".csv"))
    return 0


def _row(shape: Shape, kind: Kind, times: dict[str, Times], missing: str | None, device: str) -> list[str]:
    sizes = [str(size) for size in shape]
    if missing is not None:
        return [*sizes, kind.name, missing, "", "", "", ""]
    found = times[kind.name]
    row = find_device(device)
    peak = None if row is None else (row.peak_float8_tflops if kind.float8 else row.peak_bf16_tflops)
    tflops = 2.0 * shape.m * shape.k * shape.n / found.median / 1e12
    return [
        *sizes,
        kind.name,
        f"{1e6 * found.median:,.1f}",
        f"{1e6 * found.low:,.1f} to {1e6 * found.high:,.1f}",
        f"{tflops:,.1f}" if tflops >= 1 else f"{tflops:.3g}",
        "n/a" if peak is None else f"{100 * tflops / peak:.1f} %",
        f"{times['bf16'].median / found.median:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
