"""The roofline's rows, as CSV, Markdown tables and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.float8.pictures import Grid, axes_of, bars, can_draw, speedup_grids
from benchmarks.float8.tables import Table, host_lines
from converters.float8.config import Float8LinearRecipeName
from converters.float8.cost import LinearCost
from trainer.calibration.linears import PLAIN, Shape
from trainer.calibration.shapes import ModelLinears
from trainer.calibration.timing import Times

FLOAT8 = "float8"
"""Name of the float8 linear among measured times; PLAIN is the other's."""

HEADER = [
    "M",
    "K",
    "N",
    "recipe",
    "gemm_time_strategy",
    "fused",
    "bf16_us",
    "float8_gemm_us",
    "cast_us",
    "float8_us",
    "speedup",
    "measured_bf16_us",
    "measured_float8_us",
    "measured_speedup",
    "measured_spread_percent",
]


@dataclass(frozen=True)
class Row:
    """One shape."""

    shape: Shape
    cost: LinearCost
    has_float8: bool
    """Whether the device has float8 GEMMs at all."""
    measured: dict[str, Times] | None = None

    @property
    def speedup(self) -> float | None:
        """As measured where it was, else as modelled; None without float8 GEMMs."""
        if self.measured is not None:
            return self.measured_speedup
        return self.cost.speedup if self.has_float8 else None

    @property
    def measured_speedup(self) -> float | None:
        """None where it was not measured."""
        if self.measured is None:
            return None
        return self.measured[PLAIN].median / self.measured[FLOAT8].median

    def cells(self, recipe: str, strategy: str, *, fused: bool) -> list[str]:
        """The CSV's row: microseconds."""
        cost = self.cost
        float8 = [cost.float8_gemm_seconds, cost.cast_seconds, cost.float8_seconds]
        shown = [f"{1e6 * seconds:.2f}" for seconds in float8] + [f"{cost.speedup:.4f}"]
        cells = [
            *map(str, self.shape),
            recipe,
            strategy,
            str(fused).lower(),
            f"{1e6 * cost.bf16_gemm_seconds:.2f}",
        ]
        cells += shown if self.has_float8 else [""] * 4
        if self.measured is None:
            return [*cells, "", "", "", ""]
        plain, converted = self.measured[PLAIN], self.measured[FLOAT8]
        spread = max(plain.spread_percent, converted.spread_percent)
        cells += [f"{1e6 * plain.median:.2f}", f"{1e6 * converted.median:.2f}"]
        return [*cells, f"{plain.median / converted.median:.4f}", f"{spread:.1f}"]


def write_report(
    rows: Sequence[Row],
    linears: Sequence[ModelLinears],
    recipe: Float8LinearRecipeName,
    subject: str,
    options: argparse.Namespace,
) -> None:
    """OUT.csv, OUT.md (printed, too) and OUT.png."""
    fused = options.enable_fusion_modeling
    table = Table(HEADER)
    table.rows += [row.cells(recipe.value, options.gemm_time_strategy, fused=fused) for row in rows]
    table.write_csv(options.output)
    title = f"float8 {recipe.value} against bf16, one linear, forward + backward" + (
        ", casts fused" if fused else ""
    )
    parts = [f"# {title}", "  \n".join(host_lines(subject))]
    grids = _grids(rows)
    if grids:
        parts += [part for name, grid in grids for part in (f"## {name}", _grid_table(grid).markdown())]
    else:
        parts += ["## Speedups", _list_table(rows).markdown()]
    if linears:
        heading = f"## {options.model} {options.flavor} at {options.tokens} tokens"
        parts += [heading, *_roll_up(linears, {row.shape: row for row in rows})]
    text = "\n\n".join(parts) + "\n"
    options.output.with_suffix(".md").write_text(text)
    print(text, end="")
    print(f"wrote {options.output}, and .md beside it", file=sys.stderr)
    picture = options.output.with_suffix(".png")
    if not can_draw():
        print("no picture: matplotlib is not installed", file=sys.stderr)
    elif grids:
        speedup_grids(title, grids, picture)
    else:
        bars(title, _series(rows), "speedup over bf16", picture, one=True)


def _grids(rows: Sequence[Row]) -> list[tuple[str, Grid]]:
    """(name, (K, N) -> speedup) for each M, modelled and measured; none where the shapes form no grid."""
    found: list[tuple[str, Grid]] = []
    for m in sorted({row.shape.m for row in rows}):
        here = [row for row in rows if row.shape.m == m]
        modelled = {row.shape[1:]: row.cost.speedup for row in here if row.has_float8}
        ks, ns = axes_of(modelled)
        if len(ks) < 2 or len(ns) < 2 or len(modelled) < len(ks) * len(ns):
            return []
        found.append((f"M = {m}, modelled", modelled))
        measured = {row.shape[1:]: row.measured_speedup for row in here if row.measured_speedup is not None}
        if measured:
            found.append((f"M = {m}, measured", measured))
    return found


def _grid_table(grid: Grid) -> Table:
    ks, ns = axes_of(grid)
    rows = [[str(k), *(f"{grid[k, n]:.2f}" if (k, n) in grid else "" for n in ns)] for k in ks]
    return Table(["K \\ N", *map(str, ns)], list(rows))


def _list_table(rows: Sequence[Row]) -> Table:
    table = Table(
        ("M", "K", "N", "bf16 us", "float8 us", "modelled", "measured bf16 us", "float8 us", "measured")
    )
    for row in rows:
        modelled = ("", "")
        if row.has_float8:
            modelled = (f"{1e6 * row.cost.float8_seconds:,.0f}", f"{row.cost.speedup:.2f}x")
        measured: tuple[str, ...] = ("", "", "")
        if row.measured is not None:
            times = [f"{1e6 * row.measured[name].median:,.0f}" for name in (PLAIN, FLOAT8)]
            measured = (*times, f"{row.measured_speedup:.2f}x")
        table.rows.append(
            (*map(str, row.shape), f"{1e6 * row.cost.bf16_gemm_seconds:,.0f}", *modelled, *measured)
        )
    return table


def _series(rows: Sequence[Row]) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        name = " x ".join(map(str, row.shape))
        if row.has_float8:
            found.setdefault("modelled", []).append((name, row.cost.speedup))
        if row.measured_speedup is not None:
            found.setdefault("measured", []).append((name, row.measured_speedup))
    return found or {"modelled": []}


def _roll_up(linears: Sequence[ModelLinears], rows: dict[Shape, Row]) -> list[str]:
    """The table of a model's linears, and what converting those that gain comes to for one micro-batch."""
    table = Table(
        ("linears", "count", "M", "K", "N", "bf16 ms", "float8 ms", "speedup", "verdict"), right=range(1, 8)
    )
    plain_total = best_total = 0.0
    for group in linears:
        row = rows[group.shape]
        plain, float8 = row.cost.bf16_gemm_seconds, row.cost.float8_seconds
        if row.measured is not None:
            plain, float8 = row.measured[PLAIN].median, row.measured[FLOAT8].median
        possible = not group.impossible and row.speedup is not None
        converts = possible and float8 < plain
        plain_total += group.count * plain
        best_total += group.count * (float8 if converts else plain)
        verdict = "convert" if converts else "keep" + (f" ({group.impossible})" if group.impossible else "")
        shown = (f"{1e3 * group.count * float8:.1f}", f"{plain / float8:.2f}x") if possible else ("", "")
        cells = [group.fqn, str(group.count), *map(str, group.shape), f"{1e3 * group.count * plain:.1f}"]
        table.rows.append([*cells, *shown, verdict])
    total = (
        f"All linears, forward + backward of one micro-batch: bf16 {1e3 * plain_total:.1f} ms, with the "
        f"converted ones in float8 {1e3 * best_total:.1f} ms: {plain_total / best_total:.2f}x."
    )
    return [table.markdown(), total]
