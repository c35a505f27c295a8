"""Whole runs on one GPU: what only a GPU can show of the trainer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


def run(train, *flags, **kwargs):
    """A run on the GPU: the fixture hides it by default."""
    return train(*flags, env={"CUDA_VISIBLE_DEVICES": "0"}, **kwargs)


def test_compiled_run_prints_mfu(train):
    done = run(train, "--compile.enable", "--training.steps=20", "--metrics.log_freq=10")
    assert done.losses[-1] < done.losses[0]
    assert re.search(r"mfu: \d+\.\d\d%", done.out)
    assert re.search(r"compile \d", done.out.split("summary")[1])


@pytest.mark.parametrize("compiled", [True, False])
def test_fused_kernels_and_chunks_follow_the_plain_run(train, compiled):
    flags = ("--training.steps=20", *["--compile.enable"] * compiled)
    kernels = [f"--model.overrides.{name}_kernel=fused" for name in ("norm", "swiglu")]
    plain = run(train, *flags, name="plain")
    for name, own in {
        "fused": ["--training.loss_kernel=fused"],
        "chunks": ["--training.loss_chunk_tokens=100"],
        "all": ["--training.loss_kernel=fused", "--training.loss_chunk_tokens=100", *kernels],
    }.items():
        assert run(train, *flags, *own, name=name).losses == pytest.approx(plain.losses, rel=3e-3), name


def test_offloaded_parameters_give_the_same_losses(train):
    resident = run(train, name="resident")
    offloaded = run(train, "--training.enable_cpu_offload", name="offloaded")
    assert offloaded.losses == pytest.approx(resident.losses, rel=1e-3)


STEPS_WITHOUT_WAITING = """
import sys
import torch
from trainer import trainer
plain = trainer.Trainer.train_step
def checked(self, batches):
    quiet = 2 < self.step < 12
    torch.cuda.set_sync_debug_mode("error" if quiet else "default")
    plain(self, batches)
    torch.cuda.set_sync_debug_mode("default")
    print("quiet" if quiet else "loud", file=sys.stderr)
trainer.Trainer.train_step = checked
from trainer.train import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer.implementation=one_pass", "--parallelism.fsdp_single_shard=direct"),
        ("--model.converters=float8", "--float8.filter_fqns=output", "--float8.cast_kernels=triton"),
    ],
    ids=["bf16", "float8"],
)
def test_the_host_waits_for_nothing_in_a_step(tmp_path, flags):
    """What launches kernels stays ahead of the GPU: a wait in a step leaves it idle after each."""
    command = [sys.executable, "-c", STEPS_WITHOUT_WAITING, "--compile.enable", "--training.steps=12"]
    command += ["--metrics.log_freq=5", f"--job.dump_folder={tmp_path}", *flags]
    environment = {**os.environ, "CONFIG_FILE": "train_configs/debug_model.toml"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("quiet") >= 8


def test_deterministic_runs_are_equal_to_the_last_digit(train):
    flags = ("--debug.deterministic", "--compile.enable")
    assert run(train, *flags, name="one").losses == run(train, *flags, name="two").losses


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (
            "--model.converters=float8",
            "--float8.filter_fqns=output",
            "--float8.enable_fsdp_float8_all_gather",
            "--float8.precompute_float8_dynamic_scale_for_fsdp",
        ),
    ],
    ids=["bf16", "float8 weights"],
)
def test_out_of_memory_says_what_lowers_it(train, flags):
    done = run(
        train,
        *flags,
        "--training.seq_len=65536",
        "--training.local_batch_size=64",
        "--training.global_batch_size=-1",
        "--model.overrides.n_layers=64",
    )
    assert done.code == 3
    assert "resident:" in done.err
    assert "training.local_batch_size" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_follows_bf16(train, recipe):
    flags = ("--compile.enable", "--training.steps=30", "--metrics.log_freq=30")
    bf16 = run(train, *flags, name="bf16")
    float8 = run(
        train,
        *flags,
        "--model.converters=float8",
        f"--float8.recipe_name={recipe}",
        "--float8.filter_fqns=output",
    )
    assert float8.losses[-1] == pytest.approx(bf16.losses[-1], rel=0.02)
