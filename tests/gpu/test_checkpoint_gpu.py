"""What only a GPU can show of checkpoints: pinned copies, generators, and exact resuming of compiled runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallelisms.distributed import seed_step
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writer import boxes_held

pytestmark = pytest.mark.gpu

REPO = Path(__file__).parents[2]


def state(device):
    generator = torch.Generator(device).manual_seed(0)
    return {
        "model.w": torch.randn(4096, 4096, device=device, generator=generator),
        "model.norm": torch.randn(37, device=device, generator=generator),
        "optimizer.w.step": torch.tensor(3.0, device=device),
        "converter.float8.scale": torch.randn((), device=device, generator=generator),
        "model.on_host": torch.arange(16, dtype=torch.uint8),
    }


@pytest.mark.parametrize("pinned", [False, True], ids=["async", "async_with_pinned_mem"])
def test_copies_are_a_snapshot_and_the_memory_is_kept(pinned):
    live, staging = state("cuda"), Staging(pinned=pinned)
    boxes = boxes_held(live, None)
    staging.reserve(boxes)
    assert (staging.reserved_bytes > 2**26) == pinned
    updated, addresses = {"model.w", "model.norm", "optimizer.w.step"}, []
    for _ in range(3):
        wanted = {key: value.cpu().clone() for key, value in live.items()}
        host = staging.take(boxes, lambda box: live[box.key], updated)
        live["converter.float8.scale"].add_(1)  # at once: no step changes it alone
        live["model.on_host"].add_(1)
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
    assert staging.reserved_bytes == 0


def test_a_step_begins_with_the_same_generators_whatever_was_drawn_before():
    found = []
    for drawn in (1, 1000):
        torch.rand(drawn, device="cuda")
        torch.rand(drawn)
        seed_step(7, 3)
        found.append((torch.rand(9, device="cuda").tolist(), torch.rand(9).tolist()))
    assert found[0] == found[1]
    seed_step(7, 4)
    assert torch.rand(9, device="cuda").tolist() != found[0][0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpoint.async_mode=async_with_pinned_mem"],
        ["--model.converters=float8", "--quantize.linear.float8.recipe_name=tensorwise"],
    ],
    ids=["bf16", "float8"],
)
def test_a_killed_compiled_run_resumes_exactly(tmp_path, flags):
    """G1; the table that is printed names the first tensor that differs."""
    config = REPO / "train_configs" / "debug_model.toml"
    command = [
        *(sys.executable, "-m", "trainer.cli", "selftest", "resume", "--steps=10", "--kills=1"),
        *(f"--job.dump_folder={tmp_path}", "--compile.enable", "--training.local_batch_size=4", *flags),
    ]
    environment = {**os.environ, "CONFIG_FILE": str(config), "NGPU": "1", "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "identical: a killed run resumes exactly here" in done.stdout
