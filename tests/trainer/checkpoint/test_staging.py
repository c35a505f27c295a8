"""Host memory for copies: taken before the first save, kept, and asked for only where it is there."""

from types import SimpleNamespace

import pytest
import torch

from trainer.checkpoint import host_memory, saving
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.staging import Staging
from trainer.checkpoint.writer import boxes_held
from trainer.config.errors import ConfigError

PINNED = "--checkpoint.async_mode=async_with_pinned_mem"


def test_reserved_memory_takes_every_copy(tensors_of):
    live, staging = tensors_of(), Staging(pinned=True)
    boxes = boxes_held(live, None)
    staging.reserve(boxes)
    reserved, addresses = staging.reserved_bytes, []
    assert reserved == 192 + 128 + 64 + 64  # 140, 66, 4 and 11 bytes, in whole cache lines
    for _ in range(2):
        wanted = {key: value.clone() for key, value in live.items()}
        host = staging.take(boxes, lambda box: live[box.key], updated={"model.a.weight"})
        staging.before_update()
        for value in live.values():
            value.add_(1)
        assert all(torch.equal(host(box), wanted[box.key]) for box in boxes)
        addresses.append([host(box).data_ptr() for box in boxes])
    assert addresses[0] == addresses[1]
    assert staging.reserved_bytes == reserved
    staging.release()
    assert staging.reserved_bytes == 0


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--optimizer.implementation=foreach", "--model.overrides.tied_output"],
        [
            "--model.converters=float8",
            "--quantize.linear.float8.emulate",
            "--quantize.linear.float8.scaling_type_input=delayed",
        ],
    ],
    ids=["plain", "tied", "delayed"],
)
def test_a_run_has_all_of_it_before_step_1(run, monkeypatch, flags):
    found, write = [], saving.Saver.write

    def observed(saver, tensors, manifest, *arguments, **options):
        needed = Staging.bytes_for(boxes_held(tensors, None))
        found.append((manifest.step, needed, saver._staging.reserved_bytes))
        write(saver, tensors, manifest, *arguments, **options)

    monkeypatch.setattr(saving.Saver, "write", observed)
    done = run(PINNED, *flags)
    assert [step for step, _, _ in found] == [2, 4]
    assert all(reserved == needed > 0 for _, needed, reserved in found)
    assert done.log.count("of host memory") == 1
    assert done.log.index("of host memory") < done.log.index("step: ")
    assert run(PINNED, *flags, "--training.steps=6").log.count("of host memory") == 1  # resumed


def test_a_host_without_the_memory_is_named(run, monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10_000)
    with pytest.raises(ConfigError) as caught:
        run(PINNED)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "checkpoint.async_mode: 'async_with_pinned_mem' keeps" in lines[0]
    assert "0.00 GB left" in lines[1]
    assert len(run("--checkpoint.async_mode=async").losses) == 4


def test_ranks_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100)
    host_memory.check_host_memory(100, Ranks())
    two = SimpleNamespace(gather=lambda value: [value, ("other", 90, 95), ("other", 10, 95)])
    with pytest.raises(ConfigError, match=r"on other \(ranks there: 2\)"):
        host_memory.check_host_memory(100, two)


def test_a_containers_limit_counts(tmp_path):
    whole = host_memory.available_bytes(tmp_path / "none")
    assert whole > 2**26
    for name, text in {
        "memory.max": "50000000",
        "memory.current": "20000000",
        "memory.stat": "anon 1\ninactive_file 5000000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert host_memory.available_bytes(tmp_path) == 35_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_bytes(tmp_path) > 2**26
