"""What `octavo selftest resume` says of two checkpoints that differ."""

import torch
from safetensors.torch import save_file

from trainer.commands.selftest import _first_tensor


def test_the_tensor_that_differs_is_named(tmp_path):
    tensors = {"model.norm.weight": torch.ones(3), "rng.0.cpu": torch.zeros(4, dtype=torch.uint8)}
    changed = {**tensors, "rng.0.cpu": torch.tensor([0, 1, 0, 0], dtype=torch.uint8)}
    fewer = {"model.norm.weight": torch.ones(3)}
    for name, content in (("one", tensors), ("other", changed), ("fewer", fewer)):
        save_file(content, tmp_path / name)
    assert _first_tensor(tmp_path / "one", tmp_path / "other") == "rng.0.cpu"
    assert _first_tensor(tmp_path / "one", tmp_path / "fewer") == "one: other tensors"
