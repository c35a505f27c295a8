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


def test_an_error_on_a_hidden_rank_is_shown_and_its_code_comes_out(train, tmp_path):
    """Rank 1 fails while only rank 0 is shown."""
    (tmp_path / "breaks_rank_one.py").write_text(
        "import os\n"
        "from models import MODELS as builtin\n"
        "from dataclasses import replace\n"
        "def build(config):\n"
        "    if os.environ.get('RANK') == '1':\n"
        "        raise RuntimeError('rank one is unwell')\n"
        "    return builtin['llama3'].build(config)\n"
        "MODELS = {'fragile': replace(builtin['llama3'], build=build)}\n"
    )
    run = train(
        "--experimental.custom_import=breaks_rank_one",
        "--model.name=fragile",
        ngpu=2,
        env={"PYTHONPATH": str(tmp_path), "LOG_RANK": "0"},
    )
    assert run.code == 1
    assert "rank 1 failed" in run.err
    assert "rank one is unwell" in run.err


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
