"""Copies from a GPU that a save is written from: a snapshot, whatever training does meanwhile."""

import pytest
import torch

from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writer import boxes_held


def state(device):
    generator = torch.Generator(device).manual_seed(0)
    return {
        "model.w": torch.randn(4096, 4096, device=device, generator=generator),
        "model.norm": torch.randn(37, device=device, generator=generator),
        "optimizer.w.step": torch.tensor(3.0, device=device),
        "converter.float8.scale": torch.randn((), device=device, generator=generator),
        "rng.0.cpu": torch.arange(16, dtype=torch.uint8),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True], ids=["async", "async_with_pinned_mem"])
def test_copies_are_a_snapshot_and_the_memory_is_kept(pinned):
    live, staging = state("cuda"), Staging(pinned=pinned)
    boxes = boxes_held(live, None)
    updated, addresses = {"model.w", "model.norm", "optimizer.w.step"}, []
    for _ in range(3):
        wanted = {key: value.cpu().clone() for key, value in live.items()}
        host = staging.take(boxes, lambda box: live[box.key], updated)
        live["converter.float8.scale"].add_(1)  # at once: no step changes it alone
        live["rng.0.cpu"].add_(1)
        staging.before_update()
        for key in updated:
            live[key].add_(1)
        for box in boxes:
            assert torch.equal(host(box), wanted[box.key]), box.key
        addresses.append([host(box).data_ptr() for box in boxes])
        if pinned:
            assert all(host(box).is_pinned() for box in boxes)
    assert not pinned or addresses[0] == addresses[1] == addresses[2]
    staging.release()
