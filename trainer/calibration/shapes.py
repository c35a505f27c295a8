"""The distinct linear shapes of a configured model, as one device computes them.

The model is built on ``meta`` and converted, as `octavo plan` does, but with every filter off: the report's
rows are then all linears by shape. M is the positions of a micro-batch; tensor parallelism cuts K or N.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from converters.config import Float8SectionConfig
from trainer.calibration.linears import Shape
from trainer.plan.layout import Layout
from trainer.plan.shapes import read_model

_FLOAT8 = "quantize.linear.float8"


@dataclass(frozen=True)
class ModelLinears:
    """All linears of one local shape."""

    shape: Shape
    fqn: str
    """FQN patterns, folded."""
    count: int
    """In the whole model, over all pipeline stages."""
    impossible: str
    """Why they cannot be float8; empty where they can."""


def linears_of(config: Any, layout: Layout, device_type: str) -> list[ModelLinears]:
    """The linears of a checked configuration, large shapes first.

    Raises:
        ConfigError: the float8 settings cannot work on this device.
    """
    section = replace(config.quantize.linear.float8, filter_fqns=[], calibration=None, log_stats_freq=0)
    [report] = read_model(_only_float8(config, section), layout, device_type).reports
    found: dict[Shape, ModelLinears] = {}
    for row in report.rows:
        shape = Shape(*row.local_mkn)
        before = found.get(shape)
        fqn = row.fqn if before is None else f"{before.fqn}, {row.fqn}"
        count = row.count + (before.count if before else 0)
        found[shape] = ModelLinears(shape, fqn, count, "" if row.converted else row.reason)
    return sorted(found.values(), key=lambda linears: -linears.shape.flops)


def _only_float8(config: Any, section: Float8SectionConfig) -> Any:
    linear = replace(config.quantize.linear, float8=section)
    return replace(
        config,
        model=replace(config.model, converters=[_FLOAT8]),
        quantize=replace(config.quantize, linear=linear),
    )
