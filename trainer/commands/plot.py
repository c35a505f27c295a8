"""``octavo plot RUN [RUN...]``: curves of runs as a picture, from their ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trainer.metrics.history import RunHistory

# Told apart also by people who see few colours, and in print (Okabe and Ito 2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
_INK = "#333333"
_GRID = "#E6E6E6"

# Key of metrics.jsonl -> title of its panel; loss has the large one.
_SMALL_PANELS = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tps": "tokens per second per device",
    "memory_gib": "peak memory per device (GiB)",
}


def plot(runs: list[Path], out: Path | None = None, x: Literal["step", "tokens"] = "step") -> Path:
    """Draw loss, gradient norm, learning rate, tokens per second and memory of one run or several.

    Args:
        runs: Run folders (`job.dump_folder`), or `metrics.jsonl` files; several are drawn over each other.
        out: The PNG file. By default `plot.png` in the run's folder; for several runs, in the current one.
        x: What runs along: steps, or tokens seen.

    Returns:
        Where the picture is.

    Raises:
        ValueError: A run has no metrics that can be read.
    """
    from trainer.metrics.history import read_history

    if not runs:
        raise ValueError("octavo plot needs a run folder: octavo plot outputs")
    histories = [read_history(Path(run)) for run in runs]
    if out is None:
        out = histories[0].path.parent / "plot.png" if len(runs) == 1 else Path("plot.png")
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {out}: the picture is a PNG, name it {out.stem}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = _draw(histories, x)
    figure.savefig(out, dpi=150, facecolor="white")
    print(f"wrote {out}")
    return out


def _draw(histories: list[RunHistory], x: str) -> Any:
    # The object interface, without pyplot: no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(14, 7), layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4)
    axes = {"loss": figure.add_subplot(grid[:, :2])}
    for index, key in enumerate(_SMALL_PANELS):
        axes[key] = figure.add_subplot(grid[index // 2, 2 + index % 2])
    names = _distinct_names(histories)
    single = len(histories) == 1
    for number, history in enumerate(histories):
        color = _COLORS[number % len(_COLORS)]
        style = _STYLES[number // len(_COLORS) % len(_STYLES)]
        # Where curves coincide (a learning rate), the earlier run's shows as a rim of the later one's.
        line = {
            "color": color,
            "linestyle": style,
            "linewidth": 1.4 + 1.2 * min(len(histories) - 1 - number, 2),
        }
        labels = ("training", "validation") if single else (names[number], f"{names[number]}, validation")
        _draw_run(axes, history, labels, line, _positions(history, x))
    for key, axis in axes.items():
        title = "loss" if key == "loss" else _SMALL_PANELS[key]
        _dress(axis, title, "tokens seen" if x == "tokens" else "step", x)
    _scale_loss(axes["loss"], histories)
    for key in ("tps", "memory_gib"):
        _scale_from_zero(axes[key], histories, key)
    if single:
        figure.suptitle(names[0], x=0.012, ha="left", fontsize=15, color=_INK, fontweight="bold")
    axes["loss"].legend(loc="upper right", frameon=False, fontsize=10, labelcolor=_INK)
    return figure


def _draw_run(
    axes: dict[str, Any],
    history: RunHistory,
    labels: tuple[str, str],
    line: dict[str, Any],
    positions: Callable[[list[int]], list[float]],
) -> None:
    for key, axis in axes.items():
        steps, values = history.curve(key)
        # A single point is no line: mark it.
        marker = "o" if len(steps) == 1 else ""
        axis.plot(positions(steps), values, **line, marker=marker, label=labels[0])
    steps, values = history.curve("validation_loss")
    if steps:
        ring = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "markeredgewidth": 1.6}
        points = {"color": line["color"], "linestyle": "none", "zorder": 3, "label": labels[1]}
        axes["loss"].plot(positions(steps), values, **ring, **points)


def _positions(history: RunHistory, x: str) -> Callable[[list[int]], list[float]]:
    """A function from steps to where they are on the x axis."""
    if x == "step":
        return lambda steps: [float(step) for step in steps]
    import numpy as np

    known_steps, tokens = history.curve("tokens")
    if not known_steps:
        raise ValueError(f'{history.path}: no row has "tokens"; plot it with --x step')
    # Validation rows have a step only; tokens grow linearly between the step lines.
    return lambda steps: [float(value) for value in np.interp(steps, known_steps, tokens)]


def _dress(axis: Any, title: str, x_label: str, x: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_title(title, loc="left", fontsize=11, color=_INK)
    axis.set_xlabel(x_label, fontsize=9, color=_INK)
    axis.tick_params(colors=_INK, labelsize=9, length=0)
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#BBBBBB")
    if x == "step":
        axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    else:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if title == _SMALL_PANELS["tps"]:
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif title == _SMALL_PANELS["lr"]:
        # Matplotlib's own writes the exponent above the axis, which pushes the title up.
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _finite(histories: list[RunHistory], key: str) -> list[float]:
    return [value for history in histories for value in history.curve(key)[1] if math.isfinite(value)]


def _scale_loss(axis: Any, histories: list[RunHistory]) -> None:
    """A spike far above the first loss would press the curve flat: cut it off there."""
    values = _finite(histories, "loss")
    starts = [curve[1][0] for history in histories if (curve := history.curve("loss"))[1]]
    starts = [start for start in starts if math.isfinite(start)]
    if values and starts and max(values) > 1.5 * max(starts):
        low = min(values + _finite(histories, "validation_loss"))
        axis.set_ylim(low - 0.05 * (max(starts) - low), max(starts) * 1.1)


def _scale_from_zero(axis: Any, histories: list[RunHistory], key: str) -> None:
    axis.set_ylim(0, 1.1 * max([*_finite(histories, key), 1e-9]))
    axis.locator_params(axis="y", nbins=6)


def _distinct_names(histories: list[RunHistory]) -> list[str]:
    """Folder names, with their parents where two runs share one."""
    names = [history.name for history in histories]
    depth = 2
    while len(set(names)) < len(names) and depth < 6:
        names = ["/".join(history.path.resolve().parts[-depth - 1 : -1]) for history in histories]
        depth += 1
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names
