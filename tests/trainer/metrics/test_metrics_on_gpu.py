import json
import pickle

import pytest
import torch

from trainer.metrics.config import MetricsConfig, ProfilingConfig
from trainer.metrics.logger import MetricsLogger
from trainer.metrics.memory import MemoryMonitor
from trainer.profiling import MemorySnapshotRecorder, TraceRecorder, oom_message

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GIB = 1024**3


def test_memory_is_the_peak_since_the_last_read():
    torch.cuda.empty_cache()
    monitor = MemoryMonitor("cuda")
    big = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    del big
    first = monitor.read()
    torch.cuda.empty_cache()
    monitor.reset()
    second = monitor.read()
    assert first.active_gib == pytest.approx(2, abs=0.1)
    assert first.reserved_gib == pytest.approx(2, abs=0.1)
    assert first.reserved_percent == pytest.approx(100 * first.reserved_gib * GIB / monitor.capacity_bytes)
    assert second.active_gib < 0.1


def test_a_compiled_run_with_traces_and_snapshots(tmp_path):
    lines = []
    metrics = MetricsLogger(
        MetricsConfig(log_freq=2, peak_tflops=1000),
        tmp_path,
        flops_per_token=6 * 4096**2,
        device="cuda",
        total_steps=6,
        watch_compile=True,
        emit=lines.append,
    )
    config = ProfilingConfig(
        enable_profiling=True, profile_freq=3, profiler_warmup=1, enable_memory_snapshot=True
    )
    torch._dynamo.reset()
    layer = torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    function = torch.compile(lambda x: layer(x).square().mean())
    traces = TraceRecorder(config, tmp_path, last_step=6)
    snapshots = MemorySnapshotRecorder(config, tmp_path, device="cuda")
    with traces, snapshots:
        metrics.start()
        for step in range(1, 7):
            with metrics.data_loading():
                x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
            loss = function(x)
            loss.backward()
            metrics.count_step(8192)
            if metrics.should_log(step):
                metrics.log_step(
                    step, loss=loss.item(), max_loss=0, grad_norm=0, lr=0, tokens_seen=8192 * step
                )
            with metrics.excluded("profiling"):
                traces.step()
                snapshots.step()
    summary = metrics.finish(6, tokens_seen=6 * 8192)
    assert summary.phase_seconds["compile"] > 0.1
    assert summary.peak_memory_gib > 0.1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert rows[0]["time_compile"] > 0.1
    assert rows[-1]["time_compile"] == 0
    assert 0 < rows[-1]["mfu"] < 100
    for step in (3, 6):
        trace = json.loads((tmp_path / f"profile_traces/iteration_{step}/rank0_trace.json").read_text())
        assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
        path = tmp_path / f"memory_snapshot/iteration_{step}/rank0_memory_snapshot.pickle"
        assert pickle.loads(path.read_bytes())["segments"]


def test_out_of_memory_leaves_a_snapshot_and_a_message(tmp_path):
    config = ProfilingConfig(enable_memory_snapshot=True)
    with (
        pytest.raises(torch.OutOfMemoryError) as error,
        MemorySnapshotRecorder(config, tmp_path, device="cuda"),
    ):
        torch.empty(2**42, dtype=torch.uint8, device="cuda")
    assert (tmp_path / "memory_snapshot/iteration_1_exit/rank0_memory_snapshot.pickle").is_file()
    first, resident, remedies = oom_message(error.value, device="cuda").splitlines()
    assert first == "CUDA out of memory. Tried to allocate 4096.00 GiB."
    assert resident.startswith("resident: allocated ")
    assert remedies.startswith("to lower it: ")
