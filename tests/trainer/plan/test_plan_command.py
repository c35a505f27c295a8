"""`octavo plan` as a user runs it, and what `auto` chooses."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from trainer.commands.plan import main
from trainer.config.load import load
from trainer.metrics.devices import DEVICES
from trainer.plan.auto import USABLE_SHARE
from trainer.plan.memory import GIB
from trainer.plan.plan import make_plan
from trainer.plan.render import tps_range
from trainer.plan.resolve import resolve_for, resolve_recompute

REPO = Path(__file__).parents[3]
SHIPPED = sorted((REPO / "train_configs").glob("*.toml"))
DEVICE = {device.key: device for device in DEVICES}
WHOLE = ["--model.flavor=8B", "--training.local_batch_size=1", "--training.seq_len=8192", "--compile.enable"]
AUTO = "--activation_checkpoint.mode=auto"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_plan_at_their_stated_world_size(path, capsys):
    """The second line of each file's header is the command."""
    stated = re.search(r"^# octavo plan --world-size (\d+) --device (\w+)$", path.read_text(), re.MULTILINE)
    assert stated, f"{path.name} does not say how it is planned"
    world_size, device = stated.groups()
    code = main(["--world-size", world_size, f"--device={device}", f"--job.config_file={path}"])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "expected" in out.out or device == "cpu"
    if device != "cpu":
        assert ": fits" in out.out


def test_json_says_what_the_text_says(capsys):
    assert main([*WHOLE, AUTO, "--world-size=2", "--device", "h200", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 8_030_261_248
    assert plan["flops_per_token"] == 57_914_449_920
    assert plan["batch"]["tokens_per_step"] == 16_384
    assert plan["checkpoint_bytes"] == 12 * 8_030_261_248
    assert plan["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1}
    assert plan["activation_checkpoint"] == {
        "chosen": {"name": "none", "mode": "none", "every": 1, "per_op": False, "budget": 1.0},
        "automatic": True,
    }
    [stage] = plan["stages"]
    assert stage["reserved_bytes"] == sum(stage["by_category"].values()) == sum(stage["by_pool"].values())
    gathers = next(item for item in plan["communication"] if item["kind"] == "all-gather of weights")
    # Every weight twice, but the embedding and [norm, output] once, in bf16, half from the other rank.
    assert gathers["bytes"] == 2 * 8_030_261_248 - (2 * 128256 * 4096 + 4096)
    wq = next(layer for layer in plan["layers"] if layer["fqn"] == "layers.*.attention.wq.weight")
    assert (wq["shape"], wq["shard_shape"], wq["sharding"]) == ([4096, 4096], [2048, 4096], "rows / fsdp 2")


def test_layers_have_shapes_sharding_and_reasons(capsys):
    flags = [*WHOLE, "--model.converters=float8", "--float8.filter_fqns=output,auto_filter_small_kn"]
    assert main([*flags, "--parallelism.tensor_parallel_degree=4", "--world-size=8"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[2]: " ".join(line.split()) for line in out.splitlines() if ".weight" in line}
    assert (
        "4096 x 14336 4096 x 3584 2048 x 3584 columns / tp 4, rows / fsdp 2 float8"
        in rows["layers.*.feed_forward.w2.weight"]
    )
    assert rows["layers.*.attention.wk.weight"].endswith(
        "kept (auto_filter_small_kn: K <= 4096 and N <= 1024)"
    )
    assert "kept (filter_fqns has 'output')" in rows["output.weight"]
    assert "converted 160 of 225 linears" in out


def test_the_picture_is_a_png(tmp_path, capsys):
    file = tmp_path / "deep" / "memory.png"
    assert main(["--png", str(file), "--device=h100"]) == 0
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (1650, 825)
    assert main(["--png=memory.jpg", "--device=h100"]) == 2
    assert "name it memory.png" in capsys.readouterr().err


def test_every_mistake_at_once(capsys):
    flags = ["--parallelism.tensor_parallel_degree=3", "--training.global_batch_size=7", "--world-size=8"]
    flags += [
        "--model.converters=float8",
        "--float8.filter_fqns=outptu",
        "--parallelism.expert_parallel_degree=2",
    ]
    assert main([*flags, "--device=a100"]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    for expected in (
        "3 does not divide n_heads = 16",
        "does not fit 8 processes",
        "expert parallelism is not available",
        "nearest: 'output'",
        "a100 has no float8 GEMMs",
    ):
        assert expected in out.err, out.err
    assert "Traceback" not in out.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device=h1000"], "did you mean 'h100'"),
        (["--world-size=0"], "got '0'; allowed: an integer >= 1"),
        (["--world-size"], "--world-size: needs a value"),
        (["--training.setps=3"], "did you mean 'training.steps'"),
        (["--model.flavor=8b"], "did you mean '8B'"),
        (
            ["--device=l40s", "--model.converters=float8", "--float8.recipe_name=rowwise"],
            "no row-scaled float8",
        ),
    ],
)
def test_refusals(flags, expected, capsys):
    assert main(flags) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "device", "measured_tps"),
    [
        (["--job.config_file=train_configs/llama3_1b.toml"], "h100", 47_895),
        ([*WHOLE, "--model.overrides.n_layers=8", "--activation_checkpoint.mode=none"], "h100", 29_250),
    ],
)
def test_measured_throughput_is_in_the_range(flags, device, measured_tps):
    low, high = tps_range(make_plan(load(flags, env={}), 1, DEVICE[device]))
    assert low < measured_tps < high < 2 * low


def test_a_device_without_ceilings_has_no_time(capsys):
    assert main(["--device=cpu"]) == 0
    assert "time: n/a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "world_size", "chosen"),
    [("h200", 2, "none"), ("h100", 8, "none"), ("a100_40gb", 8, "selective op"), ("h100", 1, "full")],
)
def test_auto_takes_the_least_that_fits(device, world_size, chosen):
    plan = make_plan(load([*WHOLE, AUTO], env={}), world_size, DEVICE[device])
    assert plan.option.recompute.describe() == chosen
    usable = USABLE_SHARE * DEVICE[device].memory_gib * GIB
    cheaper = [option for option in plan.options if option.recompute_seconds < plan.option.recompute_seconds]
    assert all(option.worst.reserved_bytes > usable for option in cheaper)
    # 8B needs 16 bytes a parameter: it does not fit one H100 however much is recomputed.
    assert plan.fits == (world_size > 1)
    config, note = resolve_for(
        load([*WHOLE, AUTO], env={}).config, world_size, DEVICE[device], DEVICE[device].memory_gib * GIB
    )
    assert chosen in note
    option = "op" if chosen.endswith("op") else "2"
    assert (config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option) == (
        chosen.partition(" ")[0],
        option,
    )


def test_auto_leaves_other_modes_alone_and_recomputes_nothing_on_a_cpu(train):
    config = load(["--activation_checkpoint.mode=full"], env={}).config
    assert resolve_recompute(config, {"tp": 1}, torch.device("cpu")) == (config, "")
    run = train(AUTO, "--training.steps=1", "--training.global_batch_size=-1")
    assert run.code == 0, run.err
    assert "auto recomputes nothing on a CPU" in run.out
    assert "activation checkpointing: none" in run.out
