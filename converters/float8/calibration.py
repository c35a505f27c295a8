"""A calibration: which shapes gain from float8, as measured by `octavo calibrate` on one kind of device.

A JSON file, torch-free to read, so that a run which names one is checked before anything starts. The filter
asks it for the (M, K, N) of a linear as one device computes it. A shape that was not timed, another device or
another recipe is an error: a measurement answers for nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = "octavo float8 calibration 1"

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class ShapeTiming:
    """One linear's forward + backward, alone on the device."""

    m: int
    k: int
    n: int
    high_precision_us: float
    """Median microseconds of `nn.Linear`."""
    float8_us: float
    """Median microseconds of `Float8Linear`."""
    convert: bool
    """What the filter does with linears of this shape; may be edited by hand."""
    fqn: str = ""
    """The linears of the calibrated model that have it."""
    count: int = 0

    @property
    def speedup(self) -> float:
        """Time in high precision over time in float8."""
        return self.high_precision_us / self.float8_us


@dataclass(frozen=True)
class Calibration:
    """A file's contents."""

    device: str
    """As torch names it: ``NVIDIA H100 80GB HBM3``, or ``cpu``."""
    recipe: str
    compiled: bool
    dtype: str
    """Of activations, weights and the plain linear's GEMMs."""
    settings: dict[str, Any]
    """Other settings of the float8 section that change a linear's time, where they are not the default."""
    shapes: tuple[ShapeTiming, ...]
    made: dict[str, str] = field(default_factory=dict)
    """Date and versions, for the reader."""

    def find(self, sizes: Sizes) -> ShapeTiming | None:
        """The timing of (M, K, N), or None where it was not timed."""
        return next((row for row in self.shapes if (row.m, row.k, row.n) == sizes), None)

    def check(self, recipe: str, device: str | None = None) -> None:
        """Refuse it for another recipe or device (None: not known here).

        Raises:
            ValueError: it does not apply.
        """
        again = "run octavo calibrate with this run's settings"
        if recipe != self.recipe:
            raise ValueError(f"was made for recipe {self.recipe!r}, this run has {recipe!r}; {again}")
        if device is not None and device != self.device:
            raise ValueError(f"was made on {self.device!r}, this run is on {device!r}; {again} there")

    def write(self, path: Path) -> None:
        """Write the JSON file, its folder included."""
        rows = [{**asdict(row), "speedup": round(row.speedup, 4)} for row in self.shapes]
        text = json.dumps({"format": FORMAT, **asdict(self), "shapes": rows}, indent=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def read_calibration(path: str | Path) -> Calibration:
    """Read a file that `octavo calibrate` wrote.

    Raises:
        ValueError: there is none, or it is not one.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror or error}; octavo calibrate makes it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no {FORMAT!r}: octavo calibrate writes one")
    try:
        rows = tuple(_row(row) for row in found["shapes"])
        known = {item.name: found[item.name] for item in fields(Calibration) if item.name in found}
        calibration = Calibration(**{**known, "shapes": rows})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a part of a calibration: {error}") from None
    wrong = {"device": str, "recipe": str, "compiled": bool, "settings": dict}
    for name, kind in wrong.items():
        if not isinstance(getattr(calibration, name), kind):
            raise ValueError(f"{path}: {name} is {getattr(calibration, name)!r}, expected a {kind.__name__}")
    return calibration


def _row(row: Mapping[str, Any]) -> ShapeTiming:
    timing = ShapeTiming(**{item.name: row[item.name] for item in fields(ShapeTiming) if item.name in row})
    sizes = (timing.m, timing.k, timing.n)
    times = (timing.high_precision_us, timing.float8_us)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or not isinstance(timing.convert, bool):
        raise TypeError(f"a shape has sizes {sizes} and convert {timing.convert!r}")
    if not all(isinstance(time, int | float) and time > 0 for time in times):
        raise TypeError(f"shape {sizes} has times {times}")
    return timing


def speed_settings(section: Any) -> dict[str, Any]:
    """Settings of a float8 section that are not the default and bear on the time of a linear alone."""
    apart = {
        "recipe_name",
        "filter_fqns",
        "calibration",
        "log_stats_freq",
        "enable_fsdp_float8_all_gather",
        "precompute_float8_dynamic_scale_for_fsdp",
    }
    default = type(section)()
    return {
        item.name: getattr(section, item.name)
        for item in fields(section)
        if item.name not in apart and getattr(section, item.name) != getattr(default, item.name)
    }
