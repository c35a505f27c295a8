"""What a user sees when something is wrong: short messages, exit codes, errors of hidden ranks."""

import json

import pytest


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--training.setps=3"], "did you mean 'training.steps'"),
        (["--model.flavor=debugmodle"], "did you mean 'debugmodel'"),
        (["--model.converters=flaot8"], "did you mean 'float8'"),
        (["--training.dataset=python_source"], "did you mean 'python_sources'"),
        (["--parallelism.data_parallel_shard_degree=3"], "does not fit 1 processes"),
        (["--training.dataset=text_files", "--training.dataset_path=/no/such"], "/no/such"),
        (["--model.hf_assets_path=/no/such"], "no tokenizer at '/no/such'"),
        (["--model.overrides.vocab_size=1024"], "the tokenizer has 2048 ids"),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(train, flags, expected):
    run = train(*flags)
    assert run.code == 2
    assert expected in run.err
    assert "Traceback" not in run.err
    assert len(run.err.strip().splitlines()) <= 3


def test_bad_data_in_mid_run_names_file_and_line(train, tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "word " * 400}) + "\n"
    path.write_text(good * 3 + '{"text": \n')
    run = train("--training.dataset=text_files", f"--training.dataset_path={path}", "--training.steps=50")
    assert run.code == 2
    assert "bad.jsonl" in run.err
    assert "4" in run.err
    assert "Traceback" not in run.err


BREAKS_RANK_ONE = """
import os
import signal
from dataclasses import replace
from models import MODELS as builtin

def build(config):
    from trainer.config.errors import ConfigError, Problem
    model, calls = builtin["llama3"].build(config), []

    def fail(module, args):
        calls.append(1)
        if os.environ["RANK"] != "1" or len(calls) < 3:
            return
        if os.environ["FAILS_BY"] == "exception":
            raise RuntimeError("rank one is unwell")
        if os.environ["FAILS_BY"] == "input":
            raise ConfigError([Problem("training.dataset", "rank one cannot read it")])
        os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(fail)
    return model

MODELS = {"fragile": replace(builtin["llama3"], build=build)}
"""


@pytest.mark.parametrize(
    ("kind", "code", "first", "longest"),
    [
        ("exception", 1, "error: rank 1 failed", 60),
        ("input", 2, "error: training.dataset: rank one cannot read it", 3),
        ("kill", 137, "error: rank 1 was ended by SIGKILL", 1),
    ],
)
def test_the_rank_that_failed_first_speaks_first(train, tmp_path, kind, code, first, longest):
    """Rank 1 fails in mid-run while only rank 0 is shown, and rank 0 then loses its connection."""
    (tmp_path / "breaks_rank_one.py").write_text(BREAKS_RANK_ONE)
    run = train(
        "--experimental.custom_import=breaks_rank_one",
        "--model.name=fragile",
        ngpu=2,
        env={"PYTHONPATH": str(tmp_path), "LOG_RANK": "0", "FAILS_BY": kind},
    )
    assert run.code == code
    assert run.err.startswith(first), run.err
    assert len(run.err.strip().splitlines()) <= longest, run.err
    assert "gloo" not in run.err
    assert ("rank one is unwell" in run.err) == (kind == "exception")


def test_log_rank_chooses_what_is_shown(train):
    both = train("--training.steps=1", ngpu=2, env={"LOG_RANK": "0,1"})
    assert both.code == 0, both.err
    assert "[rank 0] step:  1" in both.out
    assert "[rank 1] step:  1" in both.out
    only = train("--training.steps=1", ngpu=2, name="other", env={"LOG_RANK": "1"})
    assert only.out.count("step:  1") == 1


def test_a_folder_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    run = train(f"--job.dump_folder={tmp_path}/file/below")
    assert run.code == 2
    assert "cannot write to" in run.err
    assert "Traceback" not in run.err


def test_bad_ngpu(train):
    run = train(ngpu="many")
    assert run.code == 2
    assert "NGPU: got 'many'" in run.err
