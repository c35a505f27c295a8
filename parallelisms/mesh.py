"""The device mesh: all ranks, arranged along named axes.

Axes from the outside (slow links) to the inside (fast links): ``pp dp_replicate dp_shard cp tp``. Every axis
is there, also at degree 1, so that no other code asks whether an axis exists.
"""

from __future__ import annotations

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
    data_group: ProcessGroup
    """The ranks that read different data: losses and token counts are summed over them, not the world,
    since the ranks of a ``tp`` group all hold the same."""

    flattened: tuple[DeviceMesh, ...] = ()
    """Joined axes that have a process group of their own."""

    @property
    def groups(self) -> list[ProcessGroup]:
        """Every process group of the mesh that this rank is in."""
        return [
            *(self.device_mesh.get_group(axis) for axis in AXES),
            *(m.get_group() for m in self.flattened),
        ]

    @property
    def stage_group(self) -> ProcessGroup | None:
        """The ranks that hold the other stages of this rank's pipeline; None where there is no pipeline."""
        return self.device_mesh.get_group("pp") if self.degrees["pp"] > 1 else None

    @property
    def layer_group(self) -> ProcessGroup | None:
        """The ranks that hold the same layers as this one; None where all ranks do."""
        joined = [mesh for mesh in self.flattened if mesh.mesh_dim_names == (_LAYERS,)]
        return joined[0].get_group() if joined else None

    @property
    def fsdp(self) -> DeviceMesh:
        """(dp_shard) for FSDP, (dp_replicate, dp_shard) for HSDP."""
        if self.degrees["dp_replicate"] > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]

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
    flattened = []
    if degrees["tp"] > 1:
        # The axes over which a gradient's norm is summed: DTensor finds them by this, and reduces once.
        flattened.append(mesh["dp_shard", "tp"]._flatten("dp_shard_tp"))
    if degrees["pp"] > 1:
        flattened.append(mesh["dp_replicate", "dp_shard", "cp", "tp"]._flatten(_LAYERS))
    data = _data_mesh(mesh, degrees)
    if data.mesh_dim_names == ("dp",):
        flattened.append(data)
    return Mesh(mesh, degrees, data.get_group(), tuple(flattened))


def _data_mesh(mesh: DeviceMesh, degrees: dict[str, int]) -> DeviceMesh:
    if degrees["dp_replicate"] == 1:
        return mesh["dp_shard"]
    if degrees["dp_shard"] == 1:
        return mesh["dp_replicate"]
    return mesh["dp_replicate", "dp_shard"]._flatten("dp")
