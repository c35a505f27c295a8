import json
import logging
import pickle

import pytest
import torch

from trainer.metrics.config import ProfilingConfig
from trainer.profiling import MemorySnapshotRecorder, TraceRecorder, oom_message, resident_bytes


def run_steps(recorder, count):
    with recorder:
        for _ in range(count):
            torch.ones(4, 4).matmul(torch.ones(4, 4))
            recorder.step()


def test_traces_on_schedule(tmp_path):
    config = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_warmup=1)
    run_steps(TraceRecorder(config, tmp_path, rank=2, first_step=11), 9)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert [str(path) for path in files] == [
        "profile_traces/iteration_14/rank2_trace.json",
        "profile_traces/iteration_18/rank2_trace.json",
    ]
    trace = json.loads((tmp_path / files[0]).read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::matmul") == 1  # one step is recorded
    assert "ProfilerStep#3" in names


def test_a_period_that_is_not_finished_gives_no_trace(tmp_path):
    config = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)
    run_steps(TraceRecorder(config, tmp_path), 3)
    assert list(tmp_path.iterdir()) == []


def test_switched_off_nothing_happens(tmp_path):
    run_steps(TraceRecorder(ProfilingConfig(profile_freq=1), tmp_path, last_step=0), 3)
    run_steps(MemorySnapshotRecorder(ProfilingConfig(profile_freq=1), tmp_path, device="cpu"), 3)
    assert list(tmp_path.iterdir()) == []


def test_a_run_too_short_for_a_trace_is_told(tmp_path, caplog):
    config = ProfilingConfig(enable_profiling=True)
    TraceRecorder(config, tmp_path, last_step=10)
    assert caplog.text == ""
    TraceRecorder(config, tmp_path, last_step=9)
    assert "ends at step 9, before its first trace at step 10" in caplog.text


def test_a_memory_snapshot_on_a_cpu_is_a_warning(tmp_path, caplog):
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=1)
    with caplog.at_level(logging.WARNING):
        run_steps(MemorySnapshotRecorder(config, tmp_path, device=torch.device("cpu")), 2)
    assert "profiling.enable_memory_snapshot has no effect on cpu" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def allocator(monkeypatch):
    """CUDA's allocator history as a recording fake."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    return calls


def test_memory_snapshots_by_the_period_and_out_of_memory(tmp_path, allocator):
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=2)
    recorder = MemorySnapshotRecorder(config, tmp_path, device="cuda:0", rank=1, first_step=5)

    def train():
        for _ in range(4):
            recorder.step()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError), recorder:
        train()
    files = sorted(path.relative_to(tmp_path / "memory_snapshot") for path in tmp_path.rglob("*.pickle"))
    assert [str(path) for path in files] == [
        "iteration_6/rank1_memory_snapshot.pickle",
        "iteration_8/rank1_memory_snapshot.pickle",
        "iteration_9_exit/rank1_memory_snapshot.pickle",
    ]
    assert pickle.loads((tmp_path / "memory_snapshot" / files[2]).read_bytes()) == {"segments": []}
    assert [call.get("enabled", "all") for call in allocator] == ["all", None]


def test_another_error_writes_no_snapshot(tmp_path, allocator):
    config = ProfilingConfig(enable_memory_snapshot=True)
    with pytest.raises(RuntimeError), MemorySnapshotRecorder(config, tmp_path, device="cuda"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    assert len(allocator) == 2


def test_resident_bytes_count_a_shared_storage_once():
    weight = torch.nn.Parameter(torch.zeros(10, 10))
    tied = torch.nn.Parameter(weight.data)
    bias = torch.nn.Parameter(torch.zeros(5))
    bias.grad = torch.zeros(5)
    optimizer = torch.optim.AdamW([bias])
    assert resident_bytes([weight, tied, bias]) == {"parameters": 420, "gradients": 20, "optimizer state": 0}
    optimizer.step()
    # Two moments and the step count.
    assert resident_bytes([bias], [optimizer])["optimizer state"] == 2 * 20 + 4
    assert resident_bytes([torch.empty(8, device="meta")])["parameters"] == 0


CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "1.02 GiB is free. Process 1 has 78.08 GiB memory in use."
)


def test_oom_message_says_what_was_resident_and_what_helps():
    message = oom_message(
        torch.OutOfMemoryError(CUDA_TEXT),
        resident={"parameters": 30 * 1024**3, "optimizer state": 60 * 1024**3},
        settings={
            "training.local_batch_size": 8,
            "training.seq_len": 8192,
            "activation_checkpoint.mode": "selective",
            "parallelism.data_parallel_shard_degree": 1,
            "model.converters": [],
        },
    )
    assert message.splitlines() == [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "resident: parameters 30.00GiB, optimizer state 60.00GiB",
        'to lower it: activation_checkpoint.mode = "full" (now selective); '
        "a smaller training.local_batch_size (now 8); a shorter training.seq_len (now 8192); "
        'model.converters = ["quantize.linear.float8"] with compile; '
        "more shards: more GPUs with parallelism.data_parallel_shard_degree (now 1)",
    ]


def test_oom_message_leaves_out_what_is_as_low_as_it_goes():
    settings = {
        "training.local_batch_size": 1,
        "activation_checkpoint.mode": "full",
        "model.converters": ["quantize.linear.float8"],
    }
    *_, remedies = oom_message(MemoryError(), settings=settings).splitlines()
    assert remedies == (
        "to lower it: a shorter training.seq_len; "
        "more shards: more GPUs with parallelism.data_parallel_shard_degree"
    )
