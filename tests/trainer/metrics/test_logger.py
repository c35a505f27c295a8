import json
import re
import subprocess
import sys

import psutil
import pytest
import torch

from trainer.arrival import Arrival
from trainer.metrics.config import (
    MetricsConfig,
    ProfilingConfig,
)
from trainer.metrics.logger import MetricsLogger
from trainer.metrics.memory import MemoryMonitor
from trainer.metrics.summary import RunSummary, summary_lines

F_8B = 57_914_449_920


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make_logger(folder, clock, lines, **kwargs):
    config = kwargs.pop("config", MetricsConfig(log_freq=5, peak_tflops=989))
    settings = {"flops_per_token": F_8B, "device": "cpu", "total_steps": 20, **kwargs}
    return MetricsLogger(config, folder, emit=lines.append, clock=clock, **settings)


def run(metrics, clock, steps=12):
    metrics.start()
    for step in range(1, steps + 1):
        with metrics.data_loading():
            clock.now += 0.25
        clock.now += 0.75
        if step == 1:
            with metrics.meter.phases.phase("compile"):
                clock.now += 30
        metrics.count_step(7034)
        if metrics.should_log(step):
            metrics.log_step(
                step,
                loss=8.0 - step / 10,
                max_loss=8.5,
                grad_norm=1.5,
                lr=1e-3,
                tokens_seen=step * 7034,
            )
        if step % 5 == 0:
            with metrics.excluded("validation"):
                clock.now += 2
            metrics.log_validation(step, 9.0)
    return metrics.finish(steps, tokens_seen=steps * 7034)


def test_scalars_of_a_converter_are_written_on_any_step(tmp_path):
    metrics = make_logger(tmp_path, Clock(), [])
    metrics.log_scalars(3, {"float8/wq": 2.0})
    metrics.log_scalars(4, {})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 3, "float8/wq": 2.0}]


class Late(Arrival):
    """Numbers of a device that is `seconds` behind its host; a CPU's are never late."""

    def __init__(self, numbers, clock, seconds):
        super().__init__(torch.tensor(numbers, dtype=torch.float64))
        self.clock, self.there = clock, clock.now + seconds

    @property
    def is_here(self):
        return self.clock.now >= self.there

    def wait(self):
        self.clock.now = max(self.clock.now, self.there)
        return super().wait()

    def seconds_ago(self):
        return self.clock.now - self.there


@pytest.mark.parametrize("launching", [0.25, 0.75])
def test_a_host_that_is_ahead_logs_a_step_when_it_is_done(tmp_path, launching):
    """Whether it has to wait for that or learns of it a while later."""
    clock, lines = Clock(), []
    metrics = make_logger(tmp_path, clock, lines, config=MetricsConfig(log_freq=2, peak_tflops=989))
    metrics.start()
    for step in range(1, 7):
        clock.now += launching  # the device takes a second
        before = len(lines)
        metrics.settle()
        assert len(lines) - before == (step in (3, 5))
        metrics.count_step(7034)
        if metrics.should_log(step):
            numbers = Late([step, 2 * step, 0.5], clock, step - clock.now)
            metrics.log_arrival(step, numbers, lr=1e-3, tokens_seen=step * 7034)
            clock.now += 0.75 - launching
            assert lines[-1].startswith("step:  1 ") == (step in (1, 2)), lines
        if step % 2:
            clock.now = max(clock.now, step - 0.5)  # what else a host does: it is half a step ahead
    summary = metrics.finish(6, tokens_seen=6 * 7034)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert [row["max_loss"] for row in rows] == [2, 4, 8, 12]
    # Each line has its own steps' tokens over the time that the device took, whatever the host had counted.
    assert [row["tps"] for row in rows] == [7034] * 4
    assert [row["time_end_to_end"] for row in rows] == [1] * 4
    assert (summary.final_loss, summary.throughput.steps, summary.throughput.tps) == (6, 5, 7034)


def test_what_follows_a_step_waits_for_its_line(tmp_path):
    clock, lines = Clock(), []
    metrics = make_logger(tmp_path, clock, lines)
    for step in (1, 5):
        metrics.count_step(7034)
        metrics.log_arrival(step, Late([1, 1, 1], clock, 2.0), lr=1e-3, tokens_seen=step)
    assert len(lines) == 1
    with metrics.excluded("validation"):
        assert lines[1].startswith("step:  5")
        clock.now += 1
    assert metrics.meter.phases.seconds() == {"training": 4, "validation": 1}
    metrics.count_step(7034)
    metrics.log_arrival(10, Late([1, 1, 1], clock, 2.0), lr=1e-3, tokens_seen=10)
    metrics.close()  # as a failed run does: it does not wait for a device that may hang
    assert len(lines) == 2


def test_a_run_from_first_step_to_summary(tmp_path):
    clock, lines = Clock(), []
    summary = run(make_logger(tmp_path, clock, lines), clock)

    step_lines = [line for line in lines if line.startswith("step:")]
    assert len(step_lines) == 3
    pattern = (
        r"step: {}  loss:  {}  grad_norm:  1\.5000  memory: .....GiB\(.*%\)  "
        r"tps: 7,034  tflops: 407\.37  mfu: 41\.19%"
    )
    for line, step, loss in zip(
        step_lines, (" 1", " 5", "10"), ("7.90000", "7.50000", "7.00000"), strict=True
    ):
        assert re.fullmatch(pattern.format(step, loss), line), line
    assert lines.count("validation at 5  loss  9.00000  (2.0s)") == 1
    assert lines.count("validation at 10  loss  9.00000  (2.0s)") == 1

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 5, 5, 10, 10]
    first, second, validation, third, _ = rows
    assert validation == {"step": 5, "validation_loss": 9.0}
    assert set(first) == {
        *("step", "loss", "max_loss", "grad_norm", "lr", "tps", "tflops", "mfu", "tokens"),
        *("memory_gib", "memory_percent", "memory_active_gib", "memory_active_percent"),
        *("memory_alloc_retries", "memory_ooms"),
        *("time_end_to_end", "time_data_loading", "time_data_loading_percent"),
        *("time_compile", "time_validation", "time_checkpoint"),
    }
    assert first["tps"] == second["tps"] == 7034
    assert second["mfu"] == pytest.approx(41.19, abs=0.005)
    assert (first["time_compile"], second["time_compile"]) == (30, 0)
    assert (second["time_validation"], third["time_validation"]) == (0, 2)
    assert (third["time_end_to_end"], third["time_data_loading"]) == (1, 0.25)
    assert third["time_data_loading_percent"] == 25
    assert third["tokens"] == 70_340

    assert summary.steps == summary.last_step == 12
    assert summary.tokens == 12 * 7034
    assert (summary.final_loss_step, summary.final_loss) == (10, 7.0)
    assert summary.throughput.steps == 11
    assert summary.throughput.tps == 7034
    assert summary.phase_seconds == {"training": 9, "data_loading": 3, "compile": 30, "validation": 4}
    assert summary.wall_seconds == 46
    assert lines[-1].endswith("46.0s = training 9.0s + data 3.0s + compile 30.0s + validation 4.0s")


def test_steps_that_are_logged(tmp_path):
    metrics = make_logger(tmp_path, Clock(), [])
    assert [step for step in range(1, 17) if metrics.should_log(step)] == [1, 5, 10, 15]
    metrics.close()
    metrics.close()


def test_a_rank_that_is_not_the_metrics_rank_prints_and_writes_nothing(tmp_path):
    clock, lines = Clock(), []
    run(make_logger(tmp_path, clock, lines, rank=1, is_metrics_rank=False), clock)
    assert sum(line.startswith("step:") for line in lines) == 3
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_has_no_mfu(tmp_path):
    clock, lines = Clock(), []
    run(make_logger(tmp_path, clock, lines, config=MetricsConfig()), clock)
    assert [line.endswith("mfu: n/a") for line in lines if line.startswith("step:")] == [True, True]
    assert '"mfu": null' in (tmp_path / "metrics.jsonl").read_text()


def test_the_summary_to_the_letter():
    from trainer.metrics.meter import Throughput

    throughput = Throughput(199, 0, 0.0, 7033.7, 407.352, 41.188, 0, 0, 0, {})
    summary = RunSummary(
        last_step=300,
        steps=200,
        tokens=13_107_200,
        final_loss=3.456789,
        final_loss_step=300,
        validation_loss=3.5,
        throughput=throughput,
        peak_memory_gib=41.256,
        peak_memory_percent=52.1,
        phase_seconds={"training": 100.0, "checkpoint": 20.0, "profiling": 5.0},
    )
    assert summary_lines(summary) == [
        "summary",
        "  steps            300, of which 200 since this process started",
        "  tokens seen      13,107,200",
        "  final loss       3.45679 at 300",
        "  validation loss  3.50000",
        "  mean throughput  7,034 tokens/s per device after warm-up (199 steps, 407.35 TFLOP/s, mfu 41.19%)",
        "  peak memory      41.26GiB (52.10%)",
        "  time             2m 05s = training 1m 40s + data 0.0s + checkpoint 20.0s + profiling 5.0s",
    ]


def test_memory_of_a_process():
    reading = MemoryMonitor("cpu").read()
    resident = psutil.Process().memory_info().rss / 1024**3
    assert reading.reserved_gib == reading.active_gib == pytest.approx(resident, rel=0.2)
    total = psutil.virtual_memory().total / 1024**3
    assert reading.reserved_percent == pytest.approx(100 * reading.reserved_gib / total)
    assert (reading.alloc_retries, reading.ooms) == (0, 0)


def test_config_defaults_and_problems(monkeypatch):
    assert MetricsConfig() == MetricsConfig(10, False, False, "tb", False, False, None)
    assert ProfilingConfig() == ProfilingConfig(False, "profile_traces", 10, 1, 3, False, "memory_snapshot")
    assert list(ProfilingConfig(enable_profiling=True).problems()) == []
    assert list(ProfilingConfig(profile_freq=2).problems()) == []
    ((field, message),) = ProfilingConfig(enable_profiling=True, profile_freq=3).problems()
    assert field == "profile_freq"
    assert "3 is shorter than warmup + active steps; allowed: >= 4" in message
    assert list(MetricsConfig().problems()) == []
    monkeypatch.setattr("trainer.metrics.config.find_spec", lambda name: None)
    ((field, message),) = MetricsConfig(enable_wandb=True).problems()
    assert field == "enable_wandb"
    assert "octavo[wandb]" in message


def test_config_and_plot_are_imported_without_torch_or_matplotlib():
    code = (
        "import sys, trainer.metrics.config, trainer.metrics.history, trainer.metrics.logger;"
        "import trainer.commands.plot, trainer.profiling;"
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'tensorboard') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
