import json

import pytest

from trainer.commands.plot import _distinct_names, plot
from trainer.metrics.history import read_history


def write_run(folder, rows):
    folder.mkdir(parents=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def row(step, loss=2.0, **more):
    row = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tps": 1000, "memory_gib": 1.5}
    return {**row, "tokens": step * 100, **more}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "a", [row(1, 3.0), row(5), {"step": 5, "validation_loss": 2.1}, row(10, 1.0)])


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_one_run_is_drawn_into_its_folder(run, capsys):
    assert plot([run]) == run / "plot.png"
    assert png_size(run / "plot.png") == (2100, 1050)
    assert capsys.readouterr().out == f"wrote {run / 'plot.png'}\n"


def test_several_runs_are_drawn_over_each_other(run, tmp_path, monkeypatch):
    # With a spike, a loss that is not a number, an unknown value, one row only.
    other = write_run(tmp_path / "b", [row(1, 3.0, mfu=None), row(2, 90.0), row(3, "nan"), row(4, 1.0)])
    single = write_run(tmp_path / "c", [row(1)])
    out = tmp_path / "pictures" / "all.png"
    assert plot([run, other, single / "metrics.jsonl"], out, x="tokens") == out
    assert png_size(out) == (2100, 1050)
    monkeypatch.chdir(tmp_path)
    assert plot([run, other]).resolve() == tmp_path / "plot.png"


def test_curves(run):
    history = read_history(run)
    assert history.name == "a"
    assert history.curve("loss") == ([1, 5, 10], [3.0, 2.0, 1.0])
    assert history.curve("validation_loss") == ([5], [2.1])
    assert history.curve("mfu") == ([], [])


def test_rows_that_a_resumed_run_went_back_behind_are_dropped(tmp_path):
    rows = [row(step, 1.0) for step in (1, 5, 10, 15, 20)]
    rows += [{"step": 20, "validation_loss": 1.0}, row(15, 2.0), row(20, 2.0)]
    history = read_history(write_run(tmp_path / "a", rows))
    assert history.curve("loss") == ([1, 5, 10, 15, 20], [1.0, 1.0, 1.0, 2.0, 2.0])
    assert history.curve("validation_loss") == ([], [])


def test_rows_of_one_step_are_one_row(tmp_path):
    """A converter writes a row of its own for a logged step."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "float8/x": 3.0}\n')
    history = read_history(tmp_path)
    assert (list(history.curve("loss")[1]), list(history.curve("float8/x")[1])) == ([2.0], [3.0])


def test_a_line_that_is_being_written_and_a_torn_one_are_left_out(tmp_path):
    run = write_run(tmp_path / "a", [row(1), {"torn_line": '{"st'}, row(5), '{"step": 10, "lo'])
    assert read_history(run).curve("loss")[0] == [1, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no metrics in this file yet"),
        ([row(1), "{nonsense\n", row(2)], r"metrics\.jsonl:2: not JSON"),
        (["[1, 2]\n"], r"metrics\.jsonl:1: not a metrics object"),
        ([{"loss": 1.0}], 'not a metrics object with a "step"'),
        ([row(1, "high")], "loss is 'high', not a number"),
    ],
)
def test_files_that_cannot_be_drawn(tmp_path, content, message):
    run = write_run(tmp_path / "a", content)
    with pytest.raises(ValueError, match=message) as error:
        plot([run])
    assert len(str(error.value).splitlines()) <= 3
    assert not (run / "plot.png").exists()


def test_runs_that_are_not_there(tmp_path, run):
    with pytest.raises(ValueError, match="no such run folder or metrics file"):
        plot([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in this folder"):
        plot([run, tmp_path / "empty"])
    with pytest.raises(ValueError, match="needs a run folder"):
        plot([])
    with pytest.raises(ValueError, match=r"name it curves\.png"):
        plot([run], tmp_path / "curves.pdf")


def test_names_of_runs_in_folders_of_one_name(tmp_path):
    histories = [
        read_history(write_run(tmp_path / name / "outputs", [row(1)])) for name in ("bf16", "float8")
    ]
    assert _distinct_names(histories) == ["bf16/outputs", "float8/outputs"]
    assert _distinct_names([histories[0], histories[0]])[1].endswith("(2)")
