"""What `octavo config` and `--help` print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from trainer.config.job import JobConfig
from trainer.config.load import load
from trainer.config.render import as_json, as_toml, docs_page, help_text
from trainer.config.schema import read_schema

REPO = Path(__file__).parents[3]
SHIPPED = sorted((REPO / "train_configs").glob("*.toml"))
FOREIGN = sorted((REPO / "tests/assets/torchtitan").glob("*.toml"))


@pytest.mark.parametrize("path", [*SHIPPED, *FOREIGN], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_merged_config_loads_to_itself(path, tmp_path):
    loaded = load([f"--job.config_file={path}"], env={})
    again = tmp_path / "again.toml"
    again.write_text(as_toml(loaded))
    second = load([f"--job.config_file={again}"], env={})
    mine, other = dict(loaded.values), dict(second.values)
    assert mine.pop("job.config_file") != other.pop("job.config_file")
    assert mine == other


def test_every_value_has_its_origin(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("[training]\nsteps = 3\n")
    text = as_toml(load([f"--job.config_file={path}", "--training.seq_len=8"], env={}))
    block = text[text.index("[training]") : text.index("[training.dataloader]")]
    lines = {line.split(" = ")[0]: line for line in block.splitlines() if " = " in line}
    assert lines["steps"].endswith("x.toml:2")
    assert lines["seq_len"].count("# --training.seq_len") == 1
    assert lines["local_batch_size"].endswith("# default")
    assert tomli.loads(text)["training"]["steps"] == 3


def test_strings_survive(tmp_path):
    nasty = 'quote " back \\ tab \t newline \n del \x7f ünïcode'
    loaded = load([f"--job.description={nasty}"], env={})
    assert tomli.loads(as_toml(loaded))["job"]["description"] == nasty


def test_json_has_all_sections():
    data = json.loads(as_json(load(["--training.steps=5"], env={})))
    assert data["training"]["steps"] == 5
    assert data["quantize"]["linear"]["float8"]["filter_fqns"] == []


def test_every_key_is_documented():
    schema = read_schema(JobConfig)
    assert [name for name, key in schema.keys.items() if len(key.doc) < 10] == []
    text = help_text(schema, "usage")
    for name in schema.keys:
        assert f"--{name}  " in text


def test_the_docs_page_is_current():
    assert (REPO / "docs/config.md").read_text() == docs_page(read_schema(JobConfig))


def test_every_key_of_the_reference_exists_with_its_default():
    """torchtitan 0.2.2's keys; where our default differs on purpose, it is listed here."""
    reference = json.loads((REPO / "tests/assets/torchtitan/keys_0_2_2.json").read_text())
    ours_on_purpose = {
        "training.dataset": "python_sources",
        "validation.dataset": "python_sources_validation",
        "checkpoint.last_save_model_only": False,
    }
    keys = read_schema(JobConfig).keys
    assert [name for name in reference if name not in keys] == []
    different = {name: keys[name].default for name, value in reference.items() if keys[name].default != value}
    assert different == ours_on_purpose


@pytest.mark.parametrize("words", [["config"], ["config", "--help"], ["config", "--training.setps=3"]])
def test_no_torch_for_a_look_at_the_config(words):
    code = (
        "import sys; from trainer.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == (2 if "--training.setps=3" in words else 0), done.stderr
    assert "Traceback" not in done.stderr
