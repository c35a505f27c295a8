"""The tools that keep the house in order, run as tests: one command checks everything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGES = ["trainer", "models", "converters", "parallelisms", "kernels"]


def run(*command):
    beside = Path(sys.executable).with_name(command[0])
    program = str(beside) if beside.exists() else shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed (extra 'dev')")
    done = subprocess.run([program, *command[1:]], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("lint-imports", "--no-cache"),
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_tool_is_content(command):
    run(*command)


def test_shell_scripts_parse():
    for script in [*REPO.glob("*.sh"), *REPO.glob(".ci/*"), *REPO.glob("train_configs/*.sbatch")]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_nothing_large_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [REPO / name for name in listed.stdout.split("\0") if name]
    assert [str(path) for path in paths if path.is_file() and path.stat().st_size > 1_000_000] == []


def test_imports_of_packages_load_no_torch():
    code = f"import sys, {', '.join(PACKAGES)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
