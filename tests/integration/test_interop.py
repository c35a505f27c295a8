"""Runs that begin and end as Hugging Face folders: real processes."""

import pytest

from tests.trainer.interop.conftest import TINY, random_model, save_model
from trainer.cli import main

MODEL = [f"--model.overrides.{name}={value}" for name, value in TINY.items()]
FLAGS = [
    "--training.steps=1",
    "--optimizer.lr=1e-30",  # so that the weights come out as they went in
    *MODEL,
    "--checkpoint.enable",
    "--checkpoint.initial_load_in_hf",
    "--checkpoint.last_save_model_only",
    "--checkpoint.last_save_in_hf",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random model, in fp32."""
    root = tmp_path_factory.mktemp("hf")
    checkpoint = save_model(random_model(max_seq_len=64, **TINY), root / "run", **TINY)
    assert main(["export", str(checkpoint), "--out", str(root / "hf")]) == 0
    return root / "hf"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "flags", [[], ["--parallelism.tensor_parallel_degree=2"]], ids=["fsdp over 2", "tp over 2"]
)
def test_two_ranks_begin_and_end_in_hugging_face_format(train, folder, flags):
    """Each rank reads its shards, rank 0 writes the gathered whole: the bytes of all files come out equal."""
    run = train(*FLAGS, f"--checkpoint.initial_load_path={folder}", *flags, ngpu=2)
    assert run.code == 0, run.err[-3000:]
    assert f"checkpoint: weights from {folder} (Hugging Face" in run.out
    assert contents(run.folder / "checkpoint" / "step-1-hf") == contents(folder)


def test_a_model_of_other_settings_is_refused(train, folder):
    """The folder next to a tokenizer is found through hf_assets_path; both values are named."""
    run = train(*FLAGS, f"--model.hf_assets_path={folder}", "--model.overrides.rope_theta=10000")
    assert run.code == 4
    assert "rope_theta 500000.0 there, 10000.0 here" in run.err
    assert len(run.err.strip().splitlines()) == 3
