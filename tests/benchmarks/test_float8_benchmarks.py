"""The float8 benchmarks' tables: sizes, equations and cells, on a CPU and without timing anything."""

import argparse
import csv
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.float8 import bench_linear_float8, bench_matmul, float8_roofline
from benchmarks.float8.hosts import ceilings_of, named_row
from benchmarks.float8.matmuls import KINDS, measured_ceilings
from benchmarks.float8.sizes import generate, model_linears, read_shape, read_sizes
from benchmarks.float8.tables import Table
from converters.float8.config import Float8LinearConfig
from trainer.calibration.linears import PLAIN, Shape
from trainer.calibration.timing import Times

REPO = Path(__file__).parents[2]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_as_text_markdown_and_csv(tmp_path):
    table = Table(("a", "long name"), [("1", "x|y"), ("200", "z")], right=(0,))
    assert table.text().splitlines() == ["  a  long name", "  1  x|y", "200  z"]
    assert table.markdown().splitlines()[2] == "| 1 | x\\|y |"
    table.write_csv(tmp_path / "deep" / "t.csv")
    assert rows_of(tmp_path / "deep" / "t.csv")[0] == {"a": "1", "long name": "x|y"}


def test_shapes_of_the_generators():
    assert generate("custom", [8], [16], [32, 64]) == [Shape(8, 16, 32), Shape(8, 16, 64)]
    assert [shape.m for shape in generate("pow2", None, None, None)] == [1024, 2048, 4096, 8192, 16384]
    assert len(generate("sweep", None, None, None)) == 125
    assert len(generate("sweep", [8192], None, None)) == 25
    llama = generate("llama", None, None, None)
    assert Shape(8192, 4096, 14336) in llama
    assert Shape(8192, 28672, 8192) in llama
    with pytest.raises(ValueError, match="needs --K, --N"):
        generate("custom", [8], None, None)
    with pytest.raises(ValueError, match="--K has no effect with --shape_gen_name llama"):
        generate("llama", None, [8], None)
    assert read_shape("8192,4096,1024") == (8192, 4096, 1024)
    assert read_sizes("1,22") == [1, 22]
    for bad in ("1,2", "1,2,x", "0,1,2"):
        with pytest.raises(argparse.ArgumentTypeError):
            read_shape(bad)


def test_linears_of_a_model_under_tensor_parallelism():
    found = {row.fqn: (row.count, *row.shape) for row in model_linears("llama3", "70B", 8192, 8)}
    assert found["layers.*.feed_forward.{w1,w3}"] == (160, 8192, 8192, 3584)
    assert found["layers.*.attention.{wk,wv}"] == (160, 8192, 8192, 128)


def test_roofline_of_a_sweep_on_an_h100(tmp_path):
    out = tmp_path / "sweep.csv"
    arguments = ["--shape_gen_name", "sweep", "--M", "8192", "--device", "h100"]
    assert float8_roofline.main([str(out), *arguments]) == 0
    rows = {(row["K"], row["N"]): row for row in rows_of(out)}
    assert len(rows) == 25
    square = rows["4096", "4096"]
    # The table's 708 and 1,268 TFLOP/s and 3.02 TB/s: 824.6 GFLOP; (10 X + 8 W + 6 Y) bytes.
    assert float(square["bf16_us"]) == pytest.approx(824_634 / 708, rel=1e-4)
    assert float(square["float8_gemm_us"]) == pytest.approx(824_634 / 1268, rel=1e-4)
    cast = (16 * 8192 * 4096 + 8 * 4096 * 4096) / 3.02e6
    assert float(square["cast_us"]) == pytest.approx(cast, rel=1e-4)
    assert float(square["speedup"]) == pytest.approx(824_634 / 708 / (824_634 / 1268 + cast), rel=1e-3)
    assert square["measured_bf16_us"] == ""
    text = out.with_suffix(".md").read_text()
    assert "## M = 8192, modelled" in text
    assert f"| 4096 | {float(rows['4096', '1024']['speedup']):.2f} |" in text
    head = out.with_suffix(".png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:])) > 300


def test_roofline_rolls_a_model_up(tmp_path, capsys):
    out = tmp_path / "8b.csv"
    arguments = ["--model", "llama3", "--device", "h100", "--float8_recipe_name", "rowwise"]
    assert float8_roofline.main([str(out), *arguments]) == 0
    text = capsys.readouterr().out
    rows = {(row["K"], row["N"]): row for row in rows_of(out)}
    small = rows["4096", "1024"]
    assert float(small["speedup"]) < 1
    expected = (
        f"| layers.*.attention.{{wk,wv}} | 64 | 8192 | 4096 | 1024 | {0.064 * float(small['bf16_us']):.1f}"
    )
    assert expected in text
    assert "| keep |" in text[text.index("{wk,wv}") :]
    assert "in float8" in text
    assert float8_roofline.main([str(out), *arguments, "--enable_fusion_modeling"]) == 0
    assert float(rows_of(out)[-1]["speedup"]) > 1


def test_roofline_of_devices_without_float8(tmp_path):
    out = tmp_path / "a100.csv"
    assert float8_roofline.main([str(out), "--shape_gen_name", "pow2", "--device", "a100"]) == 0
    assert all(row["bf16_us"] and not row["speedup"] for row in rows_of(out))
    rowwise = ["--device", "l40s", "--float8_recipe_name", "rowwise", "--shape_gen_name", "pow2"]
    assert float8_roofline.main([str(out), *rowwise]) == 0
    assert all(not row["speedup"] for row in rows_of(out))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["x.txt", "--device", "h100"], "name it x.csv"),
        (["x.csv", "--device", "h10"], "did you mean 'h100'"),
        (["x.csv", "--device", "cpu"], "unknown device 'cpu'"),
        (["x.csv", "--device", "h100", "--ceilings", "measured"], "needs the GPU in this machine"),
        (["x.csv", "--device", "h100", "--model", "llama3", "--flavor", "9B"], "unknown flavor"),
        (["x.csv", "--device", "h100", "--model", "llama3", "--M", "8"], "have no effect without"),
        (["x.csv"], "no GPU to model: name one"),
    ],
)
def test_roofline_refusals(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert float8_roofline.main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_ceilings_from_the_table_and_measured():
    import torch

    found = ceilings_of(named_row("h100"))
    assert (found.bf16_flops, found.float8_flops, found.bytes_per_second) == (708e12, 1268e12, 3.02e12)
    here = measured_ceilings(torch.device("cpu"), size=64, repetitions=2)
    assert min(here.bf16_flops, here.float8_flops, here.bytes_per_second) > 0


def test_matmul_table(tmp_path, capsys):
    out = tmp_path / "matmul.md"
    words = ["--device", "cpu", "--shapes", "32,64,48", "16,32,16", "--repetitions", "2", "-o", str(out)]
    assert bench_matmul.main(words) == 0
    rows = rows_of(out.with_suffix(".csv"))
    assert [row["GEMM"] for row in rows] == 2 * [kind.name for kind in KINDS]
    flops, us = 2 * 32 * 64 * 48, float(rows[0]["us"].replace(",", ""))
    assert float(rows[0]["TFLOP/s"]) == pytest.approx(flops / us / 1e6, rel=0.02)
    assert rows[0]["x bf16"] == "1.00"
    assert "| 32 | 64 | 48 | bf16 |" in out.read_text()
    assert "torch " in capsys.readouterr().out


def test_linear_table_on_a_cpu(tmp_path):
    out = tmp_path / "linear.txt"
    words = ["-o", str(out), "--device", "cpu", "--repetitions", "2", "--no_torchao", "--shapes", "32,64,48"]
    words += ["--recipes", "tensorwise", "rowwise_with_gw_hp", "--set", "emulate=true"]
    assert bench_linear_float8.main([*words, "--also", "round_scales_to_power_of_2=true"]) == 0
    rows = rows_of(out.with_suffix(".csv"))
    assert [row["linear"] for row in rows] == [
        "bf16",
        "octavo tensorwise (emulate=True)",
        "octavo tensorwise (emulate=True, round_scales_to_power_of_2=True)",
        "octavo rowwise_with_gw_hp (emulate=True)",
        "octavo rowwise_with_gw_hp (emulate=True, round_scales_to_power_of_2=True)",
    ]
    assert all(float(row["us"].replace(",", "")) > 0 for row in rows)


def test_linear_rows_are_ratios_of_medians():
    def times(seconds):
        return Times(seconds, seconds, seconds, 5)

    chosen = bench_linear_float8.variants(["rowwise"], {}, [], torchao=True)
    assert [variant.name for variant in chosen] == ["octavo rowwise", "torchao rowwise"]
    measured = {PLAIN: times(3e-3), "octavo rowwise": times(2e-3), "torchao rowwise": times(2.5e-3)}
    bf16, mine, its = bench_linear_float8.rows_of(Shape(8192, 4096, 4096), chosen, measured, {})
    assert mine == [
        "8192",
        "4096",
        "4096",
        "octavo rowwise",
        "2,000.0",
        "2,000.0 to 2,000.0",
        "412.3",
        "1.50",
        "1.25",
    ]
    assert (bf16[7], bf16[8]) == ("1.00", "")
    assert its[7:] == ["1.20", "1.00"]
    del measured["torchao rowwise"]
    failed = {"torchao rowwise": "ImportError: no"}
    rows = bench_linear_float8.rows_of(Shape(8192, 4096, 4096), chosen, measured, failed)
    assert rows[2][4] == "failed: ImportError: no"
    assert rows[1][8] == ""


def test_a_variant_that_cannot_run_fails_alone(tmp_path):
    out = tmp_path / "odd.txt"
    words = ["-o", str(out), "--device", "cpu", "--repetitions", "1", "--no_torchao", "--shapes", "8,20,12"]
    assert bench_linear_float8.main([*words, "--recipes", "tensorwise", "--also", "pad_inner_dim=true"]) == 1
    bf16, refused, padded = rows_of(out.with_suffix(".csv"))
    assert refused["us"].startswith("failed: ValueError: K = 20 and N = 12 must be divisible by 16")
    assert float(bf16["us"].replace(",", "")) > 0
    assert float(padded["us"].replace(",", "")) > 0


def test_settings_of_the_float8_linear():
    read = bench_linear_float8.read_settings
    assert read("emulate=true,pad_inner_dim=false") == {"emulate": True, "pad_inner_dim": False}
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean 'emulate'"):
        read("emulatte=true")
    with pytest.raises(argparse.ArgumentTypeError, match="expected field=value"):
        read("emulate")
    [variant] = bench_linear_float8.variants(["tensorwise"], {"emulate": True}, [], torchao=False)
    assert variant.config == Float8LinearConfig(emulate=True)


def test_a_script_runs_from_anywhere_with_its_own_checkout(tmp_path):
    path = REPO / "benchmarks" / "float8" / "bench_linear_float8.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "benchmarks/float8/bench_linear_float8.py -o OUT.txt" in done.stdout
