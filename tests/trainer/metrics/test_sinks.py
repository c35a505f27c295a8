import json
import logging
import sys
import types

import pytest

from trainer.metrics.config import MetricsConfig
from trainer.metrics.sinks import TAGS, JsonlSink, TensorBoardSink, WandbSink, build_sinks

# The tags that existing dashboards read.
EXPECTED_TAGS = {
    "loss_metrics/global_avg_loss",
    "loss_metrics/global_max_loss",
    "grad_norm",
    "lr",
    "n_tokens_seen",
    "throughput(tps)",
    "tflops",
    "mfu(%)",
    "time_metrics/end_to_end(s)",
    "time_metrics/data_loading(s)",
    "time_metrics/data_loading(%)",
    "memory/max_active(GiB)",
    "memory/max_active(%)",
    "memory/max_reserved(GiB)",
    "memory/max_reserved(%)",
    "memory/num_alloc_retries",
    "memory/num_ooms",
    "validation_metrics/loss",
}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_jsonl_is_on_disk_at_once_and_is_json(tmp_path):
    sink = JsonlSink(tmp_path / "run")
    sink.log(1, {"loss": 2.5, "tokens": 100, "mfu": None})
    sink.log(2, {"loss": float("nan"), "grad_norm": float("inf"), "lr": float("-inf")})
    sink.log(2, {"validation_loss": 2.25})
    assert rows(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "tokens": 100, "mfu": None},
        {"step": 2, "loss": "nan", "grad_norm": "inf", "lr": "-inf"},
        {"step": 2, "validation_loss": 2.25},
    ]
    sink.close()


def test_a_fresh_start_keeps_the_former_runs(tmp_path):
    for number in range(3):
        sink = JsonlSink(tmp_path)
        sink.log(number, {})
        sink.close()
    assert rows(tmp_path / "metrics-1.jsonl") == [{"step": 0}]
    assert rows(tmp_path / "metrics-2.jsonl") == [{"step": 1}]
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 2}]


def test_a_resumed_run_appends(tmp_path):
    for step, resume_step in ((10, None), (20, 10)):
        sink = JsonlSink(tmp_path, resume_step)
        sink.log(step, {})
        sink.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 10}, {"step": 20}]


@pytest.mark.parametrize(
    ("torn", "kept"),
    [('{"step": 20, "lo', {"torn_line": '{"step": 20, "lo'}), ('{"step": 20}', {"step": 20})],
)
def test_a_resumed_run_mends_a_line_that_was_left_half_written(tmp_path, torn, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n' + torn)
    sink = JsonlSink(tmp_path, resume_step=10)
    sink.log(20, {})
    sink.close()
    assert rows(path) == [{"step": 10}, kept, {"step": 20}]


def test_tensorboard_tags(tmp_path):
    assert set(TAGS.values()) == EXPECTED_TAGS
    sink = TensorBoardSink(tmp_path / "tb")
    sink.log(5, {**dict.fromkeys(TAGS, 1.5), "time_compile": 3.0, "my/own": 4.0})
    sink.log(6, {"loss": 1.25, "mfu": None})
    sink.close()
    curves = events(tmp_path / "tb")
    assert set(curves) == {*EXPECTED_TAGS, "my/own"}
    assert curves["loss_metrics/global_avg_loss"] == [(5, 1.5), (6, 1.25)]
    assert curves["mfu(%)"] == [(5, 1.5)]


def test_tensorboard_folder_of_a_former_run_is_kept(tmp_path):
    for resume_step in (None, None, 10):
        sink = TensorBoardSink(tmp_path / "tb", resume_step)
        sink.log(11, {"loss": 1.0})
        sink.close()
    assert len(list((tmp_path / "tb-1").iterdir())) == 1
    assert len(list((tmp_path / "tb").iterdir())) == 2


def test_which_rank_writes_what(tmp_path, caplog):
    def built(**kwargs):
        config = kwargs.pop("config", MetricsConfig())
        sinks = build_sinks(config, tmp_path / str(len(list(tmp_path.iterdir()))), **kwargs)
        for sink in sinks:
            sink.close()
        return sinks

    assert [type(sink) for sink in built()] == [JsonlSink]
    assert built(rank=1, is_metrics_rank=False) == []

    config = MetricsConfig(enable_tensorboard=True, save_tb_folder="curves")
    _, tensorboard = built(config=config)
    assert tensorboard.folder.name == "curves"
    assert built(config=config, rank=1, is_metrics_rank=False) == []

    config = MetricsConfig(enable_tensorboard=True, save_for_all_ranks=True)
    (tensorboard,) = built(config=config, rank=3, is_metrics_rank=False)
    assert tensorboard.folder.parts[-2:] == ("tb", "rank_3")

    with caplog.at_level(logging.WARNING):
        built(config=MetricsConfig(save_for_all_ranks=True))
    assert "no effect without metrics.enable_tensorboard" in caplog.text


def test_wandb_that_is_absent_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"octavo\[wandb\]") as error:
        WandbSink(tmp_path)
    assert len(str(error.value).splitlines()) <= 3


def test_wandb_gets_the_tags(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finish")

    def init(**settings):
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    sink = WandbSink(tmp_path, {"steps": 5}, resume_step=2)
    sink.log(3, {"loss": 1.0, "mfu": None, "time_compile": 1.0})
    sink.close()
    assert calls == [
        {"dir": str(tmp_path), "config": {"steps": 5}, "resume": "allow"},
        (3, {"loss_metrics/global_avg_loss": 1.0}),
        "finish",
    ]
