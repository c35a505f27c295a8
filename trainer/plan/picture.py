"""The memory of a plan as a picture: one bar for each way to recompute, against the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.plan.auto import USABLE_SHARE
from trainer.plan.memory import CATEGORIES, GIB
from trainer.plan.plan import Plan

# Told apart also by people who see few colours, and in print (Okabe and Ito 2008).
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#999999")
_INK = "#333333"


def draw(plan: Plan, out: Path) -> None:
    """Write a PNG of stacked bars, in GiB.

    Raises:
        ValueError: `out` does not end in .png.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--png is {out}: the picture is a PNG, name it {out.stem}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = _figure(plan)
    figure.savefig(out, dpi=150, facecolor="white")


def _figure(plan: Plan) -> Any:
    # The object interface, without pyplot: no window system and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    shown = list(plan.options)
    if plan.option.recompute not in [option.recompute for option in shown]:
        shown.append(plan.option)
    names = [
        option.recompute.describe() + (" *" if option.recompute == plan.option.recompute else "")
        for option in shown
    ]
    left = [0.0] * len(shown)
    for category, color in zip(CATEGORIES, _COLORS, strict=True):
        sizes = [option.worst.by_category[category] / GIB for option in shown]
        if any(sizes):
            axis.barh(names, sizes, left=left, color=color, label=category, height=0.65)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:,.1f}", va="center", fontsize=9, color=_INK)
    have = plan.device.memory_gib
    axis.axvline(have, color=_INK, linewidth=1.4)
    axis.axvline(have * USABLE_SHARE, color=_INK, linewidth=1, linestyle=":")
    axis.annotate(f"{plan.device.key} {have:.0f} GiB", (have, -0.75), fontsize=9, color=_INK, ha="right")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(*left, have))
    axis.set_xlabel("GiB per device; * is what the run uses, dotted what is usable", fontsize=9, color=_INK)
    title = f"{plan.name}, {plan.layout.world_size} x {plan.device.key} ({plan.layout.describe()})"
    axis.set_title(title, loc="left", fontsize=12, color=_INK, fontweight="bold", pad=18)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=_INK, labelsize=9, length=0)
    axis.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
