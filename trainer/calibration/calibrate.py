"""From a configuration to a `Calibration`: time each distinct shape plain and in float8, on this device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch

from converters.float8.calibration import Calibration, ShapeTiming, speed_settings
from converters.float8.config import Float8LinearConfig
from converters.float8.converter import linear_config
from trainer import __version__
from trainer.build import DTYPES
from trainer.calibration.linears import PLAIN, float8_linear, is_out_of_memory, plain_linear, time_linears
from trainer.calibration.shapes import ModelLinears
from trainer.calibration.timing import Times
from trainer.text_table import aligned

_FLOAT8 = "float8"


@dataclass(frozen=True)
class Timed:
    """One shape, and what was measured of it."""

    linears: ModelLinears
    times: dict[str, Times]
    """Empty where nothing was measured."""
    convert: bool
    remark: str
    """Why nothing was measured; empty where it was."""

    @property
    def speedup(self) -> float:
        """Time plain over time in float8."""
        return self.times[PLAIN].median / self.times[_FLOAT8].median

    def milliseconds(self, *, float8: bool) -> float:
        """Of all linears of this shape in one micro-batch."""
        return 1e3 * self.linears.count * self.times[_FLOAT8 if float8 else PLAIN].median


def time_shapes(
    found: Sequence[ModelLinears],
    config: Any,
    device: torch.device,
    *,
    compiled: bool,
    minimum_speedup: float,
    repetitions: int = 30,
) -> Iterator[Timed]:
    """Time each shape; one that does not fit the device is reported, and the next one timed."""
    float8 = block_config(config)
    dtype = DTYPES[config.training.mixed_precision_param]
    for linears in found:
        if linears.impossible:
            yield Timed(linears, {}, False, linears.impossible)
            continue
        try:
            times = _time(linears, float8, device, dtype, compiled=compiled, repetitions=repetitions)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            yield Timed(linears, {}, False, "does not fit this device alone")
            continue
        timed = Timed(linears, times, False, "")
        yield replace(timed, convert=timed.speedup > minimum_speedup)


def _time(
    linears: ModelLinears,
    config: Float8LinearConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    repetitions: int,
) -> dict[str, Times]:
    """Both forms of one linear.

    The plain one is not compiled: alone it is three GEMMs and nothing to fuse.
    """
    modules = {
        PLAIN: plain_linear(linears.shape, device, dtype),
        _FLOAT8: float8_linear(linears.shape, device, dtype, config),
    }
    names = (_FLOAT8,) if compiled else ()
    return time_linears(modules, linears.shape, device, dtype, compiled=names, repetitions=repetitions)


def block_config(config: Any) -> Float8LinearConfig:
    """The run's float8 settings for a linear that stands alone: FSDP's gather is not part of it."""
    section = replace(
        config.quantize.linear.float8,
        enable_fsdp_float8_all_gather=False,
        precompute_float8_dynamic_scale_for_fsdp=False,
    )
    return linear_config(section)


def to_calibration(timed: Sequence[Timed], config: Any, device_name: str, *, compiled: bool) -> Calibration:
    """What was measured, as the filter reads it; shapes without a time are left out."""
    section = config.quantize.linear.float8
    return Calibration(
        device=device_name,
        recipe=section.recipe_name or "tensorwise",
        compiled=compiled,
        dtype=config.training.mixed_precision_param,
        settings=speed_settings(section),
        shapes=tuple(
            ShapeTiming(
                *row.linears.shape,
                high_precision_us=round(1e6 * row.times[PLAIN].median, 2),
                float8_us=round(1e6 * row.times[_FLOAT8].median, 2),
                convert=row.convert,
                fqn=row.linears.fqn,
                count=row.linears.count,
            )
            for row in timed
            if row.times
        ),
        made={
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "octavo": __version__,
        },
    )


def render(timed: Sequence[Timed], plain_name: str) -> list[str]:
    """The table, one line a shape, and what it comes to for one micro-batch."""
    header = ("M", "K", "N", "count", f"{plain_name} us", "float8 us", "speedup", "spread", "", "linears")
    rows: list[tuple[str, ...]] = [header]
    for row in timed:
        sizes = tuple(str(size) for size in row.linears.shape)
        if row.times:
            plain, float8 = row.times[PLAIN], row.times[_FLOAT8]
            spread = f"{max(plain.spread_percent, float8.spread_percent):.0f} %"
            verdict = "convert" if row.convert else "keep"
            times = (
                f"{1e6 * plain.median:,.0f}",
                f"{1e6 * float8.median:,.0f}",
                f"{row.speedup:.2f}x",
                spread,
            )
        else:
            verdict, times = f"keep ({row.remark})", ("", "", "", "")
        rows.append((*sizes, str(row.linears.count), *times, verdict, row.linears.fqn))
    lines = list(aligned(rows, right=range(8), indent=""))
    measured = [row for row in timed if row.times]
    if measured:
        plain_ms = sum(row.milliseconds(float8=False) for row in measured)
        best_ms = sum(row.milliseconds(float8=row.convert) for row in measured)
        every_ms = sum(row.milliseconds(float8=True) for row in measured)
        lines.append(
            f"linears of one micro-batch, forward + backward: {plain_name} {plain_ms:.1f} ms, "
            f"float8 {every_ms:.1f} ms, float8 where it pays {best_ms:.1f} ms ({plain_ms / best_ms:.2f}x)"
        )
    return lines
