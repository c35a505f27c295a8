"""benchmarks/float8/training/llama3.sh: what it runs, what it reads, what it writes."""

import csv
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tomli

from benchmarks.float8.training import llama3, peer
from benchmarks.float8.training.results import (
    OCTAVO,
    PEER,
    Result,
    against_peer,
    table_of,
    with_figures,
    write_results,
)
from benchmarks.float8.training.settings import VARIANTS, read_settings
from trainer.config.preflight import preflight

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "benchmarks" / "float8" / "training" / "llama3.sh"
SMALL = {"FLAVOR": "debugmodel", "N_LAYERS": "1", "SEQ_LEN": "32", "STEPS": "3", "WARMUP_STEPS": "1"}


def settings_of(tmp_path, **env):
    return read_settings({"NGPU": "1", "OUT": str(tmp_path / "out"), **env}, REPO)


def run(tmp_path, timeout=600, **env):
    inherited = {name: value for name, value in os.environ.items() if name != "CONFIG_FILE"}
    environment = {
        **inherited,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OUT": str(tmp_path / "out"),
    }
    return subprocess.run(
        [str(SCRIPT)],
        capture_output=True,
        text=True,
        env={**environment, **env},
        timeout=timeout,
        check=False,
    )


def test_settings_come_from_the_environment(tmp_path):
    settings = settings_of(tmp_path, NGPU="8", FLOAT8_RECIPE_WITH_BEST_SETTINGS="rowwise", ACCUMULATION="4")
    assert settings.variants == ("bf16", "rowwise")
    assert (settings.flavor, settings.seq_len, settings.steps, settings.warmup_steps) == ("8B", 8192, 40, 10)
    assert settings.global_batch_size == 32
    assert settings.model == "Llama3-8B"
    assert settings_of(tmp_path, N_LAYERS="8").model == "Llama3-8B (8 layers)"
    assert settings_of(tmp_path, VARIANTS="eager, bf16").variants == ("eager", "bf16")


def test_everything_that_is_wrong_at_once(tmp_path, monkeypatch, capsys):
    env = {"FLOAT8_RECIPE_WITH_BEST_SETTINGS": "rowise", "VARIANTS": "bf17", "STEPS": "0", "FLAVOR": "8b"}
    with pytest.raises(ValueError, match="rowise") as raised:
        settings_of(tmp_path, **env, PEER="1", AC="auto")
    text = str(raised.value)
    for expected in ("did you mean 'rowwise'", "did you mean 'bf16'", "STEPS: got '0'", "did you mean '8B'"):
        assert expected in text
    assert "AC: 'auto' is Octavo's own" in text
    monkeypatch.setenv("VARIANTS", "bf17")
    monkeypatch.setattr("sys.argv", ["llama3.py"])
    assert llama3.main() == 2
    assert "unknown variant 'bf17'" in capsys.readouterr().err


@pytest.mark.parametrize("ngpu", [1, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_valid_run(variant, ngpu, tmp_path):
    settings = settings_of(tmp_path, NGPU=str(ngpu), ACCUMULATION="2", N_LAYERS="8")
    loaded = preflight([*settings.flags(variant), "--model.overrides.vocab_size=128256"], ngpu)
    float8 = loaded.config.quantize.linear.float8
    assert bool(loaded.config.model.converters) == (variant not in ("eager", "bf16"))
    assert float8.enable_fsdp_float8_all_gather == (variant == "tensorwise")
    assert float8.recipe_name == (variant if variant.startswith("rowwise") else None)
    assert loaded.config.compile.enable == (variant != "eager")
    assert loaded.config.training.global_batch_size == 2 * ngpu


def test_the_peer_is_configured_alike(tmp_path):
    env = {"NGPU": "2", "PEER": "1", "N_LAYERS": "8", "ACCUMULATION": "4", "AC": "none"}
    settings = settings_of(tmp_path, **env, PEER_EXTRA_ARGS="--debug.seed=1")
    text = peer.toml(settings, "tensorwise", tmp_path / "data", tmp_path / "tokenizer", tmp_path)
    found = tomli.loads(text)
    assert found["model"]["flavor"] == "8B_8L"
    assert found["model"]["converters"] == ["quantize.linear.float8"]
    assert found["quantize"]["linear"]["float8"] == {
        "filter_fqns": ["output"],
        "enable_fsdp_float8_all_gather": True,
        "precompute_float8_dynamic_scale_for_fsdp": True,
    }
    assert found["training"]["global_batch_size"] == 8
    assert found["activation_checkpoint"] == {"mode": "none"}
    bf16 = tomli.loads(peer.toml(settings, "bf16", tmp_path, tmp_path, tmp_path))
    assert "quantize" not in bf16
    assert bf16["compile"]["enable"] is True
    # The keys are ours too: what Octavo takes, under the same names.
    (tmp_path / "peer.toml").write_text(text.replace("8B_8L", "8B").replace("c4_test", "python_sources"))
    changed = "--training.dataset_path="
    loaded = preflight(
        [f"--job.config_file={tmp_path / 'peer.toml'}", "--comm.mode=fake_backend", changed], 2
    )
    assert loaded.config.training.seq_len == 8192
    words = peer.command(settings, tmp_path / "c.toml")
    assert words[-1] == "--debug.seed=1"
    assert "--nproc-per-node=2" in words
    environment = peer.environment(settings)
    assert environment["PEER_N_LAYERS"] == "8"
    assert str(REPO) not in environment["PYTHONPATH"].split(os.pathsep)


def test_the_peers_step_lines_are_read():
    red, end = "\x1b[31m", "\x1b[39m"
    text = (
        "[rank0]:[titan] 2026-01-01 - root - INFO - Training starts at step 1\n"
        f"[rank0]:[titan] 2026-01-01 - root - INFO - {red}step: 10  {end}loss:  8.12345  grad_norm:  1.2345  "
        "memory: 81.02GiB(57.95%)  tps: 8,712  tflops: 504.55  mfu: 51.02%\n"
        "[rank0]:[titan] - INFO - step: 15  loss:  nan  grad_norm:  nan  memory: 80.00GiB(57.2%)  tps: 9,000"
    )
    first, second = peer.read_log(text)
    assert first == {"step": 10, "loss": 8.12345, "memory_gib": 81.02, "tps": 8712.0}
    assert (second["step"], second["tps"]) == (15, 9000.0)


def test_the_peers_data_is_text(tmp_path):
    import json

    peer.write_data(tmp_path / "data")
    lines = (tmp_path / "data" / "data.json").read_text().splitlines()
    assert len(lines) > 50
    assert all(isinstance(json.loads(line)["text"], str) for line in lines)


def test_figures_and_the_table(tmp_path):
    settings = settings_of(tmp_path, VARIANTS="bf16 tensorwise rowwise", PEER="1")
    rows = [
        {"step": step, "tps": tps, "memory_gib": memory, "loss": 9.0 - step / 10}
        for step, tps, memory in [(1, 10.0, 50.0), (10, 900.0, 40.0), (15, 1000.0, 40.0), (20, 1100.0, 41.0)]
    ]
    bf16 = with_figures(Result(OCTAVO, "bf16", "run"), rows, 10)
    assert (bf16.median_tps, bf16.peak_gib, bf16.last_loss, bf16.steps_measured) == (1050.0, 50.0, 7.0, 2)
    assert with_figures(Result(OCTAVO, "bf16", "run"), rows, 20).failure == "no step line after step 20"
    results = [
        bf16,
        replace(bf16, system=PEER, median_tps=1000.0),
        replace(bf16, variant="tensorwise", median_tps=1680.0, peak_gib=44.5),
        Result(OCTAVO, "rowwise", "run", failure="exit code 3: error: out of memory"),
    ]
    header, *lines = table_of(settings, results).markdown().splitlines()
    assert header == "| Model | Scaling | Peak Memory (GB) | Median tokens/second | Speedup over baseline |"
    assert lines[1] == "| Llama3-8B | none (bf16) | 53.69 | 1,050 | 1.00x |"
    assert lines[2] == "| Llama3-8B | none (bf16), torchtitan + torchao | 53.69 | 1,000 | 0.95x |"
    assert lines[3] == "| Llama3-8B | tensorwise with float8 all-gather | 47.78 | 1,680 | 1.60x |"
    assert "failed: exit code 3: error: out of memory" in lines[4]
    assert against_peer(results) == ["- none (bf16): 1.050x the tokens/s of torchtitan + torchao"]
    settings.out.mkdir()
    write_results(settings, results)
    with (settings.out / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["status"] for row in found] == ["ok", "ok", "ok", "exit code 3: error: out of memory"]
    assert found[2]["speedup"] == "1.6000"
    assert "VARIANTS='bf16 tensorwise rowwise'" in (settings.out / "results.md").read_text()
    assert (settings.out / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_dry_run_at_eight_processes(tmp_path):
    env = {**SMALL, "DRY_RUN": "1", "NGPU": "8", "VARIANTS": "tensorwise", "PEER": "1"}
    done = run(tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NGPU=8 " in done.stdout
    assert "enable_fsdp_float8_all_gather" in done.stdout
    assert "--comm.mode=fake_backend" in done.stdout
    assert "Octavo, tensorwise: the dry run took its step" in done.stdout
    assert "torchtitan + torchao, tensorwise: not run; its configuration is" in done.stdout
    assert "dry run: rank 0 of 8 took one step" in (tmp_path / "out" / "tensorwise.log").read_text()
    assert not (tmp_path / "out" / "tensorwise").exists()


def test_a_run_and_what_fails_beside_it(tmp_path):
    """The second variant fails at once; the first has its row, and the script ends with 1."""
    done = run(tmp_path, **SMALL, VARIANTS="eager", PEER="1", PYTHONPATH="")
    assert done.returncode == 1
    assert "| Llama3-debugmodel (1 layers) | none (bf16, eager) |" in done.stdout
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        mine, its = csv.DictReader(file)
    assert (mine["status"], mine["steps_measured"]) == ("ok", "2")
    assert float(mine["median_tps"]) > 0
    assert its["status"].startswith("not installed: torchtitan")
    done = run(tmp_path, **SMALL, VARIANTS="eager", EXTRA_ARGS="--training.setps=3")
    assert done.returncode == 1
    assert "failed: exit code 2: error: --training.setps" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_compiled_variants_on_a_cpu(tmp_path):
    done = run(tmp_path, 1800, **SMALL, VARIANTS="bf16 tensorwise rowwise")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["speedup"] == "1.0000"
