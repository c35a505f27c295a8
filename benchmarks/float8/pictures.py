"""Speedups and throughputs as pictures.

Above 1 is blue, below orange: told apart also by people who see few colours (Okabe and Ito 2008).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#999999", "#333333"


def can_draw() -> bool:
    """Whether matplotlib is here; where it is not, tables are written without their picture."""
    return importlib.util.find_spec("matplotlib") is not None


def speedup_grids(title: str, grids: Sequence[tuple[str, Grid]], path: Path) -> None:
    """Panels of K down and N across, one for each (name, grid)."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    figure = _figure(title, (4.6 * columns, 3.8 * rows + 0.6))
    colors = LinearSegmentedColormap.from_list("speedup", [ORANGE, "#FFFFFF", BLUE])
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.4, vmax=1.9)
    for number, (name, grid) in enumerate(grids):
        axis = figure.add_subplot(rows, columns, number + 1)
        ks, ns = axes_of(grid)
        values = [[grid.get((k, n), float("nan")) for n in ns] for k in ks]
        axis.imshow(values, cmap=colors, norm=norm, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                shown = "" if isnan(value) else f"{value:.2f}"
                axis.text(column, row, shown, ha="center", va="center", fontsize=9, color=INK)
        axis.set_xticks(range(len(ns)), [str(n) for n in ns])
        axis.set_yticks(range(len(ks)), [str(k) for k in ks])
        axis.set_title(name, loc="left", fontsize=11, color=INK)
        axis.set_xlabel("N", fontsize=9, color=INK)
        axis.set_ylabel("K", fontsize=9, color=INK)
        axis.tick_params(colors=INK, labelsize=8, length=0)
        axis.spines[:].set_visible(False)
    _save(figure, path)


def bars(
    title: str, series: Mapping[str, Sequence[tuple[str, float]]], x_label: str, path: Path, one: bool = False
) -> None:
    """Horizontal bars: for each series (name, value) pairs; `one` draws a line at 1."""
    names = list(dict.fromkeys(name for pairs in series.values() for name, _ in pairs))
    figure = _figure(title, (10, 1.2 + 0.32 * max(3, len(names) * len(series))))
    axis = figure.add_subplot()
    height = 0.8 / len(series)
    for number, ((label, pairs), color) in enumerate(zip(series.items(), (BLUE, ORANGE, GREY), strict=False)):
        for name, value in pairs:
            place = names.index(name) + (number - (len(series) - 1) / 2) * height
            axis.barh(place, value, height * 0.9, color=color)
            shown = f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
            axis.text(value, place, f" {shown}", va="center", fontsize=9, color=INK)
        if len(series) > 1:
            axis.barh(0, 0, color=color, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max((value for pairs in series.values() for _, value in pairs), default=1.0))
    if one:
        axis.axvline(1.0, color=INK, linewidth=1, linestyle=":")
    axis.set_xlabel(x_label, fontsize=9, color=INK)
    axis.tick_params(colors=INK, labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    _save(figure, path)


Grid = Mapping[tuple[int, int], float]
"""(K, N) -> value."""


def axes_of(grid: Grid) -> tuple[list[int], list[int]]:
    """Values of K and of N, ascending."""
    return sorted({k for k, _ in grid}), sorted({n for _, n in grid})


def _figure(title: str, size: tuple[float, float]) -> Any:
    # The object interface, without pyplot: no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=INK, fontweight="bold")
    return figure


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
