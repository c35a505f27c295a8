"""The dry batch leaves no trace, and meets what step 1 would meet."""

import pytest
import torch

from trainer.config.errors import ConfigError
from trainer.trainer import DeviceMemoryError

DELAYED = (
    "--model.converters=float8",
    "--quantize.linear.float8.emulate",
    "--quantize.linear.float8.scaling_type_input=delayed",
)


@pytest.mark.parametrize("flags", [(), DELAYED], ids=["plain", "delayed float8"])
def test_losses_and_state_are_the_same(prepare, flags):
    plain = prepare(*flags, "--training.steps=3", name="plain").train()
    losses, state = plain.losses, plain.state()
    dry = prepare(*flags, "--training.steps=3", "--resilience.dry_batch", name="dry").train()
    assert "dry batch: a step fits" in dry.log
    assert losses == dry.losses
    assert state.keys() == dry.state().keys()
    assert all(torch.equal(value, state[key]) for key, value in dry.state().items())
    assert plain.trainer.data.windows == dry.trainer.data.windows


def test_memory_and_folders_fail_before_step_1(prepare, tmp_path):
    run = prepare("--resilience.dry_batch", name="memory")

    def too_large(batch, valid, last):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    run.trainer.forward.forward_backward = too_large
    with pytest.raises(DeviceMemoryError):
        run.train()
    assert run.trainer.step == 0
    run = prepare("--resilience.dry_batch", "--profiling.enable_profiling", name="folder")
    (run.folder / "profile_traces").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write to"):
        run.train()
    assert run.trainer.step == 0
