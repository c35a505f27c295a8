"""The device mesh: all ranks, arranged along named axes.

Axes from the outside (slow links) to the inside (fast links): ``pp dp_replicate dp_shard cp tp``. Every axis
is there, also at degree 1, so that no other code asks whether an axis exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallelisms.config import ParallelismConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
_LAYERS = "same_layers"


@dataclass(frozen=True)
class Mesh:
    """The mesh and the views of it that the rest of the program asks for."""

    device_mesh: DeviceMesh
    degrees: dict[str, int]
    flattened: Mapping[str, DeviceMesh]
    """Several axes as one, each with a process group of its own."""
    data_group: ProcessGroup
    """The ranks that read different data: losses and token counts are summed over them, not the world,
    since the ranks of a ``tp`` group all hold the same (and those of a ``cp`` group parts of the same)."""

    @property
    def groups(self) -> Iterator[ProcessGroup]:
        """Every process group of the mesh that this rank is in."""
        for mesh in (*(self.device_mesh[axis] for axis in AXES), *self.flattened.values()):
            yield mesh.get_group()

    @property
    def stage_group(self) -> ProcessGroup | None:
        """The ranks that hold the other stages of this rank's pipeline; None where there is no pipeline."""
        return self.device_mesh.get_group("pp") if self.degrees["pp"] > 1 else None

    @property
    def layer_group(self) -> ProcessGroup | None:
        """The ranks that hold the same layers as this one; None where all ranks do."""
        joined = self.flattened.get(_LAYERS)
        return None if joined is None else joined.get_group()

    @property
    def fsdp(self) -> DeviceMesh:
        """(shard) for FSDP, (dp_replicate, shard) for HSDP; shard is dp_shard, or dp_shard x cp as one.

        Ranks of a ``cp`` group use all weights and have gradients of different positions, just as
        ranks of ``dp_shard`` have of different sequences.
        """
        shard = self.flattened.get("dp_shard_cp", self.device_mesh["dp_shard"])
        if self.degrees["dp_replicate"] == 1:
            return shard
        if self.degrees["cp"] == 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        # No public way to put a flattened axis beside another one (torch 2.13).
        return DeviceMesh._concatenate([self.device_mesh["dp_replicate"], shard])

    @property
    def dp_degree(self) -> int:
        """Ranks that read different data."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    @property
    def dp_rank(self) -> int:
        """This rank's place among them, from 0."""
        replica = self.device_mesh["dp_replicate"].get_local_rank()
        return replica * self.degrees["dp_shard"] + self.device_mesh["dp_shard"].get_local_rank()

    @property
    def non_data_parallel_degree(self) -> int:
        """Devices that work on the same tokens: cp x tp x pp."""
        return self.degrees["cp"] * self.degrees["tp"] * self.degrees["pp"]

    def describe(self) -> str:
        """One line: ``dp_shard 4 x tp 2``."""
        shown = [f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " x ".join(shown) or "one device"


def build_mesh(config: ParallelismConfig, device_type: str, world_size: int) -> Mesh:
    """The mesh of a checked configuration; -1 of the sharding degree takes what the others leave."""
    degrees = {
        "pp": config.pipeline_parallel_degree,
        "dp_replicate": config.data_parallel_replicate_degree,
        "dp_shard": config.data_parallel_shard_degree,
        "cp": config.context_parallel_degree,
        "tp": config.tensor_parallel_degree,
    }
    if degrees["dp_shard"] == -1:
        degrees["dp_shard"] = 1
        for axis in AXES:
            if axis != "dp_shard":
                world_size //= degrees[axis]
        degrees["dp_shard"] = world_size
    mesh = init_device_mesh(device_type, tuple(degrees[axis] for axis in AXES), mesh_dim_names=AXES)
    flattened = {name: mesh[axes]._flatten(name) for name, axes in _flattened_axes(degrees).items()}
    if degrees["dp_replicate"] == 1:
        data = mesh["dp_shard"]
    else:
        data = flattened.get("dp", mesh["dp_replicate"])
    return Mesh(mesh, degrees, flattened, data.get_group())


def _flattened_axes(degrees: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Name -> axes of what is used as one axis."""
    found: dict[str, tuple[str, ...]] = {}
    if degrees["cp"] > 1:
        found["dp_shard_cp"] = ("dp_shard", "cp")
    if degrees["tp"] > 1:
        # The axes over which a gradient's norm is summed: DTensor finds them by this, and reduces once.
        axes = ("dp_shard", "cp", "tp") if degrees["cp"] > 1 else ("dp_shard", "tp")
        found["_".join(axes)] = axes
    if degrees["pp"] > 1:
        found[_LAYERS] = ("dp_replicate", "dp_shard", "cp", "tp")
    if degrees["dp_replicate"] > 1 and degrees["dp_shard"] > 1:
        found["dp"] = ("dp_replicate", "dp_shard")
    return found


def picture(degrees: Mapping[str, int]) -> list[str]:
    """The ranks as a table: a row for each place along the outer axes, columns along the innermost one.

    ::

        dp_shard  cp | tp 0 1
               0   0 |    0 1
               0   1 |    2 3

    Rows and columns of large worlds are cut in the middle; one device has no picture.
    """
    used = [(axis, degrees[axis]) for axis in AXES if degrees[axis] > 1]
    if not used:
        return []
    *outer, (inner, width) = used
    rows = math.prod(degree for _, degree in outer)
    digits = len(str(rows * width - 1))

    def line(labels: list[str], lead: str, numbers: list[str]) -> str:
        left = "  ".join(label.rjust(len(axis)) for label, (axis, _) in zip(labels, outer, strict=True))
        right = " ".join([lead.rjust(len(inner)), *(number.rjust(digits) for number in numbers)])
        return f"{left} | {right}" if outer else right

    columns = _cut(width, 8)
    lines = [line([axis for axis, _ in outer], inner, [str(c) if c >= 0 else "…" for c in columns])]
    for row in _cut(rows, 8):
        place, labels = row, list[str]()
        for _, degree in reversed(outer):
            labels.insert(0, str(place % degree) if row >= 0 else "…")
            place //= degree
        ranks = [str(row * width + c) if c >= 0 and row >= 0 else "…" for c in columns]
        lines.append(line(labels, "" if outer else "rank", ranks))
    return lines


def _cut(count: int, most: int) -> list[int]:
    """0..count-1, or its two ends around a -1."""
    if count <= most:
        return list(range(count))
    return [*range(most - 3), -1, count - 1]
