"""The mesh: its views, process groups, picture; data-parallel replicas over processes."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallelisms.config import ParallelismConfig
from parallelisms.distributed import set_collective_timeout
from parallelisms.fsdp import apply_fsdp
from parallelisms.mesh import AXES, build_mesh, picture
from tests.ranks import run_ranks


def degrees(**given):
    return {axis: given.get(axis, 1) for axis in AXES}


def test_picture_has_a_row_for_each_place_of_the_outer_axes():
    assert picture(degrees(dp_shard=2, cp=2, tp=2)) == [
        "dp_shard  cp | tp 0 1",
        "       0   0 |    0 1",
        "       0   1 |    2 3",
        "       1   0 |    4 5",
        "       1   1 |    6 7",
    ]
    assert picture(degrees(dp_shard=4)) == ["dp_shard 0 1 2 3", "    rank 0 1 2 3"]
    assert picture(degrees()) == []


def test_picture_of_a_large_world_is_small():
    lines = picture(degrees(pp=4, dp_replicate=2, dp_shard=256, tp=8))
    assert len(lines) == 8
    assert max(map(len, lines)) < 80
    assert lines[-1].endswith(" 16383")
    assert lines[-1].split()[:3] == ["3", "1", "255"]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(3, 5, bias=False)})

    def forward(self, x):
        return self.layers["0"](x)


def replicas(mesh):
    """What a rank of DDP holds, and the gradient for which each rank gives its number."""
    torch.manual_seed(0)
    model = Tiny()
    weight = model.layers["0"].weight.detach().clone()
    note = apply_fsdp(
        model,
        "layers",
        {},
        mesh.fsdp,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=False,
        cpu_offload=False,
    )
    model(torch.full((1, 3), float(dist.get_rank()))).sum().backward()
    parameter = model.layers["0"].weight
    return {
        "note": note,
        "whole": torch.equal(parameter.to_local().detach(), weight),
        "gradient": parameter.grad.to_local()[0, 0].item(),
    }


def view(mesh):
    return {
        "fsdp": tuple(mesh.fsdp.shape),
        "fsdp_ranks": sorted(mesh.fsdp.mesh.flatten().tolist()),
        "dp": (mesh.dp_rank, mesh.dp_degree),
        "data": dist.get_process_group_ranks(mesh.data_group),
        "non_data": mesh.non_data_parallel_degree,
    }


def timeouts():
    """Seconds of every process group of this process, and how many there are."""
    groups = list(dist.distributed_c10d._world.pg_map)
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def worker(rank, folder):
    timeout = timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timeout
    )
    found = {}
    for name, config in {
        "cp": ParallelismConfig(context_parallel_degree=2),
        "hsdp_cp": ParallelismConfig(data_parallel_replicate_degree=2, context_parallel_degree=2),
        "cp_tp": ParallelismConfig(context_parallel_degree=2, tensor_parallel_degree=2),
        "hsdp": ParallelismConfig(data_parallel_replicate_degree=2),
    }.items():
        mesh = build_mesh(config, "cpu", 4)
        found[name] = view(mesh)
        set_collective_timeout(mesh.groups, 77)
    found["timeouts"] = timeouts()
    ddp = build_mesh(ParallelismConfig(data_parallel_replicate_degree=4), "cpu", 4)
    found["ddp"] = view(ddp) | replicas(ddp)
    every = [None] * 4
    dist.all_gather_object(every, found)
    if rank == 0:
        torch.save(every, f"{folder}/found")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    """What each of four ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, 4, folder)
        return torch.load(Path(folder) / "found")


def test_weights_are_sharded_over_sequences_and_their_parts(found):
    """The data group has no ranks of one cp group: their losses are added apart."""
    last = found[3]
    assert last["cp"] == {
        "fsdp": (4,),
        "fsdp_ranks": [0, 1, 2, 3],
        "dp": (1, 2),
        "data": [1, 3],
        "non_data": 2,
    }
    assert (last["hsdp_cp"]["fsdp"], last["hsdp_cp"]["data"]) == ((2, 2), [1, 3])
    assert (last["cp_tp"]["fsdp"], last["cp_tp"]["data"], last["cp_tp"]["non_data"]) == ((2,), [3], 4)
    assert (last["hsdp"]["fsdp"], last["hsdp"]["dp"], last["hsdp"]["data"]) == ((2, 2), (3, 4), [0, 1, 2, 3])


def test_every_group_gets_the_new_timeout(found):
    """Those of flattened axes too."""
    for each in found:
        assert len(each["timeouts"]) > len(AXES)
        assert set(each["timeouts"]) == {77.0}


def test_replicas_hold_whole_weights_and_sum_gradients(found):
    for each in found:
        assert each["ddp"]["note"].startswith("DDP over 4: ")
        assert each["ddp"]["whole"]
        assert each["ddp"]["gradient"] == 0 + 1 + 2 + 3
