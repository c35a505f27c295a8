"""Checkpoints of random models, without a training run."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.llama3.config import FLAVORS
from models.llama3.model import Llama3
from trainer.checkpoint.folders import step_folder
from trainer.checkpoint.manifest import MODEL_ONLY, Manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.state import model_tensors
from trainer.checkpoint.writer import local_data, make_plan, to_host, write_checkpoint
from trainer.data.paths import PROJECT_ROOT

TOKENIZER = str(PROJECT_ROOT / "tests/assets/tokenizer")
TINY = {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32}


def random_model(flavor="debugmodel", seed=0, max_seq_len=256, **overrides):
    """A model whose norms are off 1 and whose projections are wide enough: what is misplaced shows."""
    torch.manual_seed(seed)
    model = Llama3(replace(FLAVORS[flavor], max_seq_len=max_seq_len, **overrides))
    std = 0.02 if model.config.dim > 1000 else 0.06
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, std)
    return model.eval()


def save_model(model, root, flavor="debugmodel", step=1, dtype=None, **overrides):
    """Write a model as a run would, as step-N below `root`; returns the step's folder."""
    settings = {
        "model.name": "llama3",
        "model.flavor": flavor,
        "model.hf_assets_path": TOKENIZER,
        "training.seq_len": model.config.max_seq_len,
        **{f"model.overrides.{name}": value for name, value in overrides.items()},
    }
    tensors = {f"model.{fqn}": tensor.detach() for fqn, tensor in model_tensors(model).items()}
    manifest = Manifest(step, MODEL_ONLY, {"step": step, "world_size": 1}, config=settings)
    target = step_folder(Path(root), step)
    plan = make_plan(tensors, dtype, Ranks())
    write_checkpoint(target, plan, lambda box: to_host(local_data(tensors, box), box), manifest, Ranks())
    return target


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    """(model, folder with its checkpoint and its Hugging Face folder); made once."""
    from trainer.interop.export import export_hf
    from trainer.interop.trained import open_trained

    folder = tmp_path_factory.mktemp("tiny")
    model = random_model(**TINY)
    checkpoint = save_model(model, folder / "tiny", **TINY)
    export_hf(open_trained(str(checkpoint)), folder / "tiny-hf", largest_file_bytes=200_000)
    return model, folder


@pytest.fixture
def tiny(tiny_source, tmp_path):
    """(model, its checkpoint): two layers, grouped heads, random weights."""
    shutil.copytree(tiny_source[1] / "tiny", tmp_path / "tiny")
    return tiny_source[0], tmp_path / "tiny" / "step-1"


@pytest.fixture
def tiny_hf(tiny_source, tmp_path):
    """(model, a Hugging Face folder of it in several files)."""
    return tiny_source[0], shutil.copytree(tiny_source[1] / "tiny-hf", tmp_path / "tiny-hf")
