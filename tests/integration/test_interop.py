"""Runs that begin and end as Hugging Face folders: real processes."""

import pytest

from tests.trainer.interop.conftest import TINY, random_model, save_model
from trainer.checkpoint.files import CheckpointError
from trainer.cli import main
from trainer.config.errors import ConfigError
from trainer.config.preflight import preflight
from trainer.interop.export import open_for_run

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
    "flags",
    [[], ["--parallelism.tensor_parallel_degree=2"], ["--parallelism.pipeline_parallel_degree=2"]],
    ids=["fsdp over 2", "tp over 2", "pp over 2"],
)
def test_two_ranks_begin_and_end_in_hugging_face_format(train, folder, flags):
    """Each rank reads its shards, rank 0 writes the gathered whole: the bytes of all files come out equal."""
    run = train(*FLAGS, f"--checkpoint.initial_load_path={folder}", *flags, ngpu=2)
    assert run.code == 0, run.err[-3000:]
    assert f"checkpoint: weights from {folder} (Hugging Face" in run.out
    assert contents(run.folder / "checkpoint" / "step-1-hf") == contents(folder)


def test_a_model_of_other_settings_is_refused(folder, monkeypatch):
    """The folder next to a tokenizer is found through hf_assets_path; both values are named."""
    monkeypatch.delenv("CONFIG_FILE", raising=False)
    flags = [*FLAGS, f"--model.hf_assets_path={folder}"]
    assert open_for_run(preflight(flags, 1).config).path == folder
    for change, message in {
        "rope_theta=10000": "rope_theta 500000.0 there, 10000.0 here",
        "norm_eps=1e-6": "rms_norm_eps 1e-05 there, 1e-06 here",
        "n_kv_heads=4": "num_key_value_heads 2 there, 4 here",
        "vocab_size=4096": "vocab_size 2048 there, 4096 here",
        "rope_scaling=true": "rope_scaling.rope_type default there, llama3 here",
        "tied_output=true": "tie_word_embeddings False there, True here",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            open_for_run(preflight([*flags, f"--model.overrides.{change}"], 1).config)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ConfigError, match="leave initial_load_model_only on"):
        preflight([*flags, "--checkpoint.initial_load_model_only=false"], 1)
    with pytest.raises(ConfigError, match="block-quantized"):
        preflight([*flags, "--checkpoint.initial_load_in_hf_quantized"], 1)
