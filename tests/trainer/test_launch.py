"""The launcher: counting GPUs, environment, packages that shadow ours, help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.errors import ConfigError
from trainer.launch import _number, _torchrun_options, visible_gpus

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1,3", 3), ("0,-1,2", 1), ("GPU-ab, GPU-cd", 2)]
)
def test_visible_devices_are_counted_as_cuda_does(value, count):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == count


def test_numbers_of_the_environment():
    assert _number({"NGPU": " 4 "}, "NGPU", 1) == 4
    assert _number({}, "NGPU", 3) == 3
    assert _number({"MAX_RESTARTS": "0"}, "MAX_RESTARTS", 0, least=0) == 0
    for bad in ("two", "0", "-1", "1.5"):
        with pytest.raises(ConfigError, match="an integer >= 1"):
            _number({"NGPU": bad}, "NGPU", 1)


def test_torchrun_options_for_one_and_many_nodes():
    one = _torchrun_options({}, 2, 1, 0)
    assert "--nproc-per-node=2" in one
    assert "--rdzv-endpoint=localhost:0" in one
    many = _torchrun_options({"RDZV_ENDPOINT": "node0:29400", "RDZV_ID": "x", "NODE_RANK": "1"}, 8, 4, 3)
    assert {"--nnodes=4", "--rdzv-endpoint=node0:29400", "--rdzv-id=x", "--node-rank=1"} <= set(many)
    assert "--max-restarts=3" in many
    address = _torchrun_options({"MASTER_ADDR": "head", "MASTER_PORT": "1234"}, 8, 2, 0)
    assert "--rdzv-endpoint=head:1234" in address


def test_help_shows_every_section():
    done = subprocess.run(
        [str(REPO / "run_train.sh"), "--help"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.startswith("usage: ./run_train.sh")
    for section in ("[training]", "[quantize.linear.float8]", "[checkpoint]", "[comm]"):
        assert section in done.stdout


@pytest.mark.parametrize("module", ["trainer.cli", "trainer.launch", "trainer.train"])
def test_a_foreign_package_is_named(tmp_path, module):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    code = f"import sys; from {module} import main; sys.exit(main(['config']))"
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 2
    assert f"models ({tmp_path / 'models'})" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_unknown_command_gets_the_nearest_name():
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "confg"], capture_output=True, text=True, cwd=REPO, check=False
    )
    assert done.returncode == 2
    assert "did you mean 'config'" in done.stderr


def test_plot_takes_run_folders_as_words(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            f'{{"step": {s}, "loss": {8 - s}, "grad_norm": 1, "lr": 1, "tps": 1, "memory_gib": 1}}\n'
            for s in (1, 2)
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "plot", str(tmp_path)], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    bad = subprocess.run(
        [sys.executable, "-m", "trainer.cli", "plot", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
