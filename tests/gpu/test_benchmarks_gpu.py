"""The benchmarks and `octavo calibrate` on a CUDA GPU, at small sizes: that they measure, not how fast."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.float8 import bench_linear_float8, bench_matmul, float8_roofline
from benchmarks.float8.matmuls import KINDS
from converters.float8.calibration import read_calibration
from trainer.calibration.timing import time_in_turns
from trainer.commands.calibrate import main as calibrate
from trainer.config.preflight import preflight
from trainer.metrics.devices import find_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    pytestmark.append(pytest.mark.skip(reason="needs compute capability 9.0 for rowwise float8"))

REPO = Path(__file__).parents[2]
FLOAT8 = "--quantize.linear.float8"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_repetition_is_timed_and_the_work_runs():
    device = torch.device("cuda", 0)
    counts = torch.zeros(2, device=device)
    works = {"a": lambda: counts[0].add_(1), "b": lambda: counts[1].add_(1)}
    times = time_in_turns(works, device, repetitions=7)
    # Three to warm up, and in each of three rounds one that shows what the host needs.
    assert counts.tolist() == [13, 13]
    assert [times[name].repetitions for name in "ab"] == [7, 7]
    assert all(0 < times[name].low <= times[name].median <= times[name].high for name in "ab")


def test_calibrate_writes_a_file_that_a_run_takes(tmp_path):
    out = tmp_path / "calibration.json"
    flags = ["--training.local_batch_size=1", "--training.seq_len=2048", "--model.overrides.n_layers=1"]
    flags += ["--compile.enable", f"{FLOAT8}.recipe_name=rowwise"]
    assert calibrate([*flags, "--world-size=1", "--repetitions=5", f"--out={out}"]) == 0
    made = read_calibration(out)
    assert made.device == torch.cuda.get_device_name(0)
    assert made.compiled
    assert len(made.shapes) == 4
    calibrated = [*flags, "--model.converters=float8", f"{FLOAT8}.calibration={out}"]
    assert preflight(calibrated, 1).config.quantize.linear.float8.calibration == str(out)
    environment = {**os.environ, "NGPU": "1"}
    words = [
        str(REPO / "run_train.sh"),
        *calibrated,
        "--training.steps=2",
        f"--job.dump_folder={tmp_path}/run",
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "calibration: " in done.stdout


def test_matmuls(tmp_path):
    out = tmp_path / "matmul.md"
    assert bench_matmul.main(["--shapes", "1024,512,256", "--repetitions", "3", "-o", str(out)]) == 0
    rows = rows_of(out.with_suffix(".csv"))
    assert [row["GEMM"] for row in rows] == [kind.name for kind in KINDS]
    assert all(float(row["TFLOP/s"]) > 0 for row in rows)


def test_linears_compiled(tmp_path):
    out = tmp_path / "linear.txt"
    words = ["-o", str(out), "--compile", "--shapes", "1024,512,256", "512,256,1024", "--repetitions", "3"]
    recipes = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
    assert bench_linear_float8.main([*words, "--no_torchao", "--recipes", *recipes]) == 0
    rows = rows_of(out.with_suffix(".csv"))
    assert len(rows) == 2 * 4
    assert all(float(row["us"].replace(",", "")) > 0 for row in rows)


@pytest.mark.parametrize("strategy", ["roofline", "benchmarks"])
def test_roofline_measures(strategy, tmp_path):
    out = tmp_path / "roofline.csv"
    words = ["--shape_gen_name", "custom", "--M", "1024", "--K", "512,1024", "--N", "256,512"]
    words += ["--gemm_time_strategy", strategy, "--repetitions", "3"]
    if find_device(torch.cuda.get_device_name(0)) is None:
        words += ["--ceilings", "measured"]
    assert float8_roofline.main([str(out), *words]) == 0
    rows = rows_of(out)
    assert len(rows) == 4
    assert all(float(row["measured_speedup"]) > 0 for row in rows)
    assert out.with_suffix(".png").exists()


def test_a_training_comparison(tmp_path):
    script = REPO / "benchmarks" / "float8" / "training" / "llama3.sh"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CONFIG_FILE"},
        "FLAVOR": "debugmodel",
        "SEQ_LEN": "256",
        "STEPS": "6",
        "WARMUP_STEPS": "2",
        "NGPU": "1",
        "OUT": str(tmp_path / "out"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run([str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[0]["speedup"] == "1.0000"
