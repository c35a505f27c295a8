"""docs/worked_example.md is run as it stands: every command, in order, in a copy of the checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.metrics.history import read_history

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "worked_example.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path):
    """The checkout's files under a folder of its own, and an `octavo` that runs them."""
    for path in REPO.iterdir():
        if path.name not in ("outputs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "octavo").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trainer.cli "$@"\n')
    (programs / "octavo").chmod(0o755)
    return tmp_path


def run(checkout, kind, text):
    path = f"{checkout / 'programs'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(checkout),
        "NGPU": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("CONFIG_FILE", None)
    program = ["bash", "-euc"] if kind == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, text], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_every_command_of_the_page_runs(checkout):
    pytest.importorskip("transformers")
    blocks = BLOCK.findall(PAGE.read_text())
    said = {text.split("\n")[0]: run(checkout, kind, text) for kind, text in blocks}
    assert len(said) == len(blocks) >= 10

    def output(start):
        return next(out for line, out in said.items() if line.startswith(start))

    assert (checkout / "outputs/example/tokens/validation/index.json").is_file()
    assert "every file is as written" in output("octavo tokenize outputs")
    history = read_history(checkout / "outputs" / "example" / "run")
    losses = history.curve("loss")[1]
    assert losses[-1] < losses[0] - 0.5
    validation = history.curve("validation_loss")[1][-1]
    assert output("octavo eval outputs/example/run --steps").startswith(f"loss: {validation:.5f}  ppl: ")
    assert "tokens/s" in output("octavo generate outputs/example/run")
    ours = output("octavo generate outputs/example/hf").splitlines()
    theirs = output("from transformers").splitlines()
    # transformers computes in the bfloat16 of the folder, Octavo on a CPU in fp32: the text begins alike.
    assert ours[0][:17] == theirs[0].removeprefix("<|begin_of_text|>")[:17]
    assert 'flavor = "debugmodel"' in output("octavo import")
