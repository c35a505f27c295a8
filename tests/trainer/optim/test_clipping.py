"""The joint norm of sharded gradients: equal to that of the whole, one number an axis."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.ranks import run_ranks
from trainer.optim.clipping import GradNorms, total_norm

ROWS, COLUMNS, SAME = Shard(0), Shard(1), Replicate()
LAYOUTS = [
    # placements of gradients on a mesh of 2 x 2; the collectives that their norm may take
    ([(ROWS, COLUMNS)] * 3, 2),
    ([(ROWS, SAME)] * 3, 1),
    ([(SAME, COLUMNS)] * 3, 1),
    ([(SAME, SAME)] * 3, 0),
    ([(ROWS, COLUMNS), (ROWS, SAME), (ROWS, ROWS)], 2),
    ([(SAME, SAME), (ROWS, SAME), (SAME, COLUMNS)], 2),
    ([(ROWS, COLUMNS), (Partial(), SAME), (ROWS, SAME)], 3),  # a sum that has not been taken
]


def gradients(dtype=torch.float32):
    """The second is of one row: some ranks have none of it."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 6), (1, 4), (7, 3)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def joint(tensors):
    return float(torch.cat([t.flatten().double() for t in tensors]).norm())


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    pairs, stages = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])[0], dist.group.WORLD
    whole = gradients()
    for placements, collectives in LAYOUTS:
        own = [distribute_tensor(t, mesh, list(p)) for t, p in zip(whole, placements, strict=True)]
        for i, placement in enumerate(placements):
            if placement[0] == Partial():
                half = distribute_tensor(whole[i] / 2, mesh, [SAME, SAME]).to_local()
                own[i] = DTensor.from_local(half, mesh, list(placement))
        with CommDebugMode() as seen:
            norm = total_norm(own)
        assert float(norm) == pytest.approx(joint(whole), rel=1e-7), placements
        assert seen.get_total_counts() == collectives, placements
    narrow = [distribute_tensor(t, mesh["tp"], [COLUMNS]) for t in gradients(torch.bfloat16)]
    mixed = [distribute_tensor(whole[0], mesh, [ROWS, COLUMNS]), *narrow, torch.ones(3)]
    assert float(total_norm(mixed)) == pytest.approx(
        joint([whole[0], *gradients(torch.bfloat16), torch.ones(3)]), rel=1e-7
    )
    # As if each rank were a stage of its own: of all four, whose gradients differ, and of pairs.
    norm = total_norm([t * (1 + rank // 2) for t in whole], stages)
    assert float(norm) == pytest.approx(math.sqrt(1 + 1 + 4 + 4) * joint(whole), rel=1e-7)
    norm = total_norm(whole, pairs)
    assert float(norm) == pytest.approx(math.sqrt(2) * joint(whole), rel=1e-7)
    dist.destroy_process_group()


def test_layouts_have_one_norm(tmp_path):
    run_ranks(worker, 4, str(tmp_path))


def test_single_norms_name_the_bad_gradients():
    tensors = [torch.ones(4), torch.ones(2, dtype=torch.bfloat16), torch.ones(3), torch.ones(0)]
    tensors[1][1], tensors[2][0] = math.nan, math.inf
    single = GradNorms()
    assert math.isnan(total_norm(tensors, single=single))
    assert single.not_finite() == [1, 2]
    assert sorted(place for places, _ in single.parts for place in places) == [0, 1, 2, 3]


def test_the_kernels_norms_clip_alike(monkeypatch):
    """Where Triton runs they come from its kernel; the joint norm is made of them."""
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton is compiled here: tests/gpu has this")
    tensors = [*gradients(), torch.randn(10_000), *gradients(torch.bfloat16)]
    plain = float(total_norm(tensors))
    monkeypatch.setattr("kernels.norm.runs_triton", lambda device: True)
    single = GradNorms()
    assert float(total_norm(tensors, single=single)) == pytest.approx(plain, rel=1e-6)
    assert {norms.dtype for _, norms in single.parts} == {torch.float32}
