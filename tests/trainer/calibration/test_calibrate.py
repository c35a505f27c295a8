"""`octavo calibrate`: which shapes, how they are timed, and the file that a run then takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.float8.calibration import read_calibration
from converters.float8.config import Float8LinearConfig
from trainer.calibration.calibrate import Timed, render, to_calibration
from trainer.calibration.linears import PLAIN, Shape, float8_linear, make_operands, plain_linear, time_linears
from trainer.calibration.shapes import ModelLinears, linears_of
from trainer.calibration.timing import Times, summarize, time_in_turns
from trainer.commands.calibrate import main
from trainer.commands.words import read_words
from trainer.config.load import load
from trainer.config.preflight import preflight
from trainer.plan.layout import build_layout

REPO = Path(__file__).parents[3]
CPU = torch.device("cpu")
SMALL = ["--training.local_batch_size=1", "--training.seq_len=32", "--model.overrides.n_layers=1"]
FLOAT8 = "--quantize.linear.float8"


def linears(*flags, world_size=1):
    config = load(flags, env={}).config
    found = linears_of(config, build_layout(config, world_size), "cpu")
    return {row.fqn: (row.count, *row.shape) for row in found}


def test_distinct_linears_of_8b_with_filters_off():
    flags = ["--model.flavor=8B", "--training.local_batch_size=2", "--training.seq_len=4096"]
    assert linears(*flags, f"{FLOAT8}.filter_fqns=output,auto_filter_small_kn") == {
        "output": (1, 8192, 4096, 128256),
        "layers.*.feed_forward.{w1,w3}": (64, 8192, 4096, 14336),
        "layers.*.feed_forward.w2": (32, 8192, 14336, 4096),
        "layers.*.attention.{wq,wo}": (64, 8192, 4096, 4096),
        "layers.*.attention.{wk,wv}": (64, 8192, 4096, 1024),
    }


def test_linears_as_one_rank_computes_them():
    flags = ["--model.flavor=8B", "--training.local_batch_size=1", "--training.seq_len=8192"]
    found = linears(*flags, "--parallelism.tensor_parallel_degree=4", world_size=4)
    assert found["layers.*.attention.wq"] == (32, 8192, 4096, 1024)
    assert found["layers.*.attention.wo"] == (32, 8192, 1024, 4096)
    assert found["layers.*.feed_forward.w2"] == (32, 8192, 3584, 4096)
    assert found["layers.*.attention.{wk,wv}"] == (64, 8192, 4096, 256)


def test_median_and_tenths():
    times = summarize([float(value) for value in range(1, 31)])
    assert (times.median, times.low, times.high, times.repetitions) == (15.5, 4.0, 27.0, 30)
    assert times.spread_percent == pytest.approx(100 * 23 / 15.5)
    assert summarize([2.0]) == Times(2.0, 2.0, 2.0, 1)


def test_pieces_of_work_take_turns():
    calls = []
    times = time_in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, repetitions=7)
    assert "".join(calls) == "aaabbb" + "aabb" + "aabb" + "aaabbb"
    assert [times[name].repetitions for name in "ab"] == [7, 7]


def test_plain_and_float8_linears_are_the_same_linear():
    shape = Shape(32, 48, 64)
    plain = plain_linear(shape, CPU, torch.bfloat16)
    converted = float8_linear(shape, CPU, torch.bfloat16, Float8LinearConfig())
    assert torch.equal(plain.weight, converted.weight)
    operands = make_operands(shape, CPU, torch.bfloat16)
    assert operands.x.shape == (32, 48)
    assert operands.dy.shape == (32, 64)
    assert torch.equal(operands.x, make_operands(shape, CPU, torch.bfloat16).x)
    times = time_linears({PLAIN: plain, "float8": converted}, shape, CPU, torch.bfloat16, repetitions=2)
    assert times.keys() == {PLAIN, "float8"}
    assert plain.weight.grad is None
    with pytest.raises(ValueError, match="divisible by 16"):
        float8_linear(Shape(32, 48, 7), CPU, torch.bfloat16, Float8LinearConfig())
    assert shape.flops == 6 * 32 * 48 * 64


def test_table_and_file_say_what_was_measured():
    def times(microseconds):
        return Times(microseconds * 1e-6, microseconds * 0.9e-6, microseconds * 1.1e-6, 9)

    def row(n, count, plain, float8, convert):
        found = ModelLinears(Shape(8192, 4096, n), f"w{n}", count, "")
        return Timed(found, {PLAIN: times(plain), "float8": times(float8)}, convert, "")

    odd = Timed(ModelLinears(Shape(8192, 4096, 7), "odd", 1, "N = 7 ..."), {}, False, "N = 7 ...")
    timed = [row(14336, 2, 3000, 2000, True), row(1024, 10, 300, 400, False), odd]
    lines = render(timed, "bf16")
    assert lines[1].split() == [
        "8192",
        "4096",
        "14336",
        "2",
        "3,000",
        "2,000",
        "1.50x",
        "20",
        "%",
        "convert",
        "w14336",
    ]
    assert lines[2].split() == [
        "8192",
        "4096",
        "1024",
        "10",
        "300",
        "400",
        "0.75x",
        "20",
        "%",
        "keep",
        "w1024",
    ]
    assert lines[3].split() == ["8192", "4096", "7", "1", "keep", "(N", "=", "7", "...)", "odd"]
    # 2 x 3 + 10 x 0.3 = 9; 2 x 2 + 10 x 0.4 = 8; 2 x 2 + 10 x 0.3 = 7
    assert lines[4].endswith("bf16 9.0 ms, float8 8.0 ms, float8 where it pays 7.0 ms (1.29x)")
    config = load([f"{FLOAT8}.recipe_name=rowwise"], env={}).config
    made = to_calibration(timed, config, "NVIDIA H100 80GB HBM3", compiled=True)
    assert (made.device, made.recipe, made.compiled) == ("NVIDIA H100 80GB HBM3", "rowwise", True)
    assert [(shape.n, shape.speedup, shape.convert) for shape in made.shapes] == [
        (14336, 1.5, True),
        (1024, 0.75, False),
    ]


def test_the_command_times_every_shape_and_a_plan_uses_it(tmp_path, capsys):
    from trainer.commands.plan import main as plan

    out = tmp_path / "calibration.json"
    words = ["--device=cpu", "--repetitions=2", f"--out={out}", "--minimum-speedup", "0.0001"]
    assert main([*SMALL, *words]) == 0
    text = capsys.readouterr().out
    assert "for debugging, not for speed" in text
    made = read_calibration(out)
    assert {(row.m, row.k, row.n, row.count) for row in made.shapes} == {
        (32, 256, 2048, 1),
        (32, 256, 768, 2),
        (32, 768, 256, 1),
        (32, 256, 256, 4),
    }
    assert all(row.convert for row in made.shapes)
    flags = [*SMALL, "--model.converters=float8", f"{FLOAT8}.calibration={out}"]
    assert plan([*flags, "--device=cpu"]) == 0
    assert "converted 8 of 8 linears" in capsys.readouterr().out
    assert plan([*flags, "--device=cpu", "--training.seq_len=64"]) == 2
    assert "calibration: lacks (M, K, N) = (64, 256, 256)" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_with_all_else_that_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--training.setps=3", "--out=x.txt", "--minimum-speedup=no", "--repetitions=0"]) == 2
    errors = capsys.readouterr().err
    for expected in (
        "times this machine's GPU, and there is none",
        "did you mean 'training.steps'",
        "name it x.txt.json",
        "--minimum-speedup: got 'no'",
        "--repetitions: got '0'",
    ):
        assert expected in errors
    assert main(["--device=cpu", "--model.converters=float8", f"{FLOAT8}.emulate"]) == 2
    assert "there is no float8 GEMM to time" in capsys.readouterr().err
    assert main(["--device=tpu"]) == 2
    assert "allowed: cuda, cpu" in capsys.readouterr().err


def test_a_bad_file_stops_a_run_before_torch_is_there(tmp_path):
    code = (
        "import sys\n"
        "from trainer.config.errors import ConfigError\n"
        "from trainer.config.preflight import preflight\n"
        "try:\n"
        f"    preflight(['--model.converters=float8', '{FLOAT8}.calibration={tmp_path}/no.json'], 1)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert "No such file or directory; octavo calibrate makes it" in done.stdout, done.stderr
    assert done.stdout.endswith("False\n")


def test_a_file_without_the_converter_is_not_read():
    loaded = preflight([f"{FLOAT8}.calibration=absent.json"], 1)
    assert loaded.config.quantize.linear.float8.calibration == "absent.json"


def test_words_are_sorted():
    words = read_words(
        ["--world_size", "4", "--json", "--png=a.png", "--x.world_size=3", "--out", "--json"],
        ("--world-size", "--png", "--out"),
        ("--json",),
    )
    assert words.options == {"--world-size": "4", "--png": "a.png", "--out": "--json"}
    assert words.rest == ["--x.world_size=3"]
    assert [str(problem) for problem in words.problems] == ["--out: needs a value"]
