"""A device that ran out of memory: three lines and exit code 3, whatever the parameters are made of."""

import pytest
import torch

from converters.float8 import Float8LinearConfig
from converters.float8.fsdp import FSDPFloat8Shard, shard_for_float8_gather
from converters.float8.gathered import GatheredFloat8
from parallelisms.dtensor import local_part
from trainer.profiling import MemorySnapshotRecorder, oom_message, resident_bytes
from trainer.resilience.exit_codes import EXIT_OUT_OF_MEMORY
from trainer.train import _failed
from trainer.trainer import DeviceMemoryError

FLOAT8 = ("--model.converters=float8", "--float8.emulate", "--float8.enable_fsdp_float8_all_gather")
GIB = 1024**3


def ran_out(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")


def held_when(run, monkeypatch):
    """Train until memory runs out; the message's lines, and the bytes it was made from."""
    counted = {}

    def note(exc, *, resident, **others):
        counted.update(resident)
        return oom_message(exc, resident=resident, **others)

    monkeypatch.setattr("trainer.profiling.oom_message", note)
    with pytest.raises(DeviceMemoryError) as error:
        run.train()
    assert _failed(error.value, 0, run.trainer, run.folder, []) == EXIT_OUT_OF_MEMORY
    return str(error.value).splitlines(), counted


def test_bytes_of_a_wrapper_are_those_of_what_it_wraps():
    plain = torch.randn(16, 32)
    shard = shard_for_float8_gather(plain, Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    assert isinstance(shard, FSDPFloat8Shard)
    scale = torch.ones(())
    gathered = GatheredFloat8(plain.to(torch.float8_e4m3fn), scale, torch.bfloat16)
    assert resident_bytes([shard])["parameters"] == 16 * 32 * 4
    assert resident_bytes([shard, plain, shard])["parameters"] == 16 * 32 * 4
    assert resident_bytes([gathered])["parameters"] == 16 * 32 + 4
    shard.grad = torch.zeros(16, 32)
    optimizer = torch.optim.AdamW([shard])
    optimizer.step()
    assert resident_bytes([gathered], [optimizer]) == {
        "parameters": 16 * 32 * 5 + 4,
        "gradients": 16 * 32 * 4,
        "optimizer state": 2 * 16 * 32 * 4 + 4,
    }


@pytest.mark.parametrize("single", ["copy", "direct"])
def test_float8_shards_in_the_optimizer(prepare, monkeypatch, single):
    flags = ["--training.global_batch_size=2", f"--parallelism.fsdp_single_shard={single}"]
    run = prepare(*FLOAT8, *flags, "--optimizer.implementation=one_pass")
    params = list(run.trainer.model.parameters())
    assert any(isinstance(local_part(p), FSDPFloat8Shard) for p in params)
    numbers = sum(p.numel() for p in params)
    step = run.trainer.faults.optimizer_step
    monkeypatch.setattr(
        run.trainer.faults, "optimizer_step", lambda *a: ran_out() if run.trainer.step == 2 else step(*a)
    )
    lines, counted = held_when(run, monkeypatch)
    assert lines[0] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert lines[1].startswith(f"resident: parameters {4 * numbers / GIB:.2f}GiB, gradients ")
    assert lines[2].startswith("to lower it: ")
    assert len(lines) == 3
    assert counted["parameters"] == 4 * numbers
    assert counted["optimizer state"] == 8 * numbers + 4 * len(params)
    # Directly, one pass reads gradients in bf16.
    assert counted["gradients"] == (4 if single == "copy" else 2) * numbers


def test_masters_count_while_the_modules_hold_their_copies(prepare, monkeypatch):
    """In forward, where memory mostly runs out, with weights that stay gathered."""
    run = prepare(*FLOAT8, "--training.global_batch_size=2", "--parallelism.fsdp_single_shard=direct")
    trainer = run.trainer
    params = list(trainer.model.parameters())
    numbers = sum(p.numel() for p in params)
    linear = [p.numel() for p in params if isinstance(local_part(p), FSDPFloat8Shard)]
    norms = sum(p.numel() for p in params if p.ndim == 1)
    held = []

    def hook(module, inputs):
        if trainer.step == 2:
            held.extend(module.parameters())
            ran_out()

    trainer.model.layers["1"].register_forward_pre_hook(hook)
    _, counted = held_when(run, monkeypatch)
    assert any(isinstance(p, GatheredFloat8) for p in held)
    # A copy in float8 has a scale, one of a norm is bf16, the embedding has none.
    assert counted["parameters"] == 4 * numbers + sum(linear) + 4 * len(linear) + 2 * norms


def test_a_report_that_fails_does_not_hide_what_it_is_about(prepare, monkeypatch):
    run = prepare()
    monkeypatch.setattr(run.trainer.forward, "forward_backward", ran_out)
    monkeypatch.setattr("trainer.profiling._storage_bytes", lambda tensors: 1 / 0)
    lines, counted = held_when(run, monkeypatch)
    assert [line.partition(" ")[0] for line in lines] == ["CUDA", "to"]
    assert counted == {}
    assert "the report on it is incomplete: ZeroDivisionError" in run.log


def test_neither_does_a_snapshot_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    from trainer.metrics.config import ProfilingConfig

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", dict)
    (tmp_path / "memory_snapshot").write_text("in the way")
    config = ProfilingConfig(enable_memory_snapshot=True)
    with pytest.raises(torch.OutOfMemoryError), MemorySnapshotRecorder(config, tmp_path, device="cuda"):
        ran_out()
    assert "memory snapshot: not written" in caplog.text


def test_memory_that_runs_out_where_nobody_explains_it(caplog):
    """When a checkpoint is restored, say: the same exit code and message, without the run's figures."""
    with pytest.raises(torch.OutOfMemoryError) as error:
        ran_out()
    assert _failed(error.value, 0, None, None, []) == EXIT_OUT_OF_MEMORY
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.\nto lower it: " in caplog.text
    assert "Traceback" not in caplog.text
