"""The same comparison by torchtitan + torchao: their configuration, their data, their step lines.

As a script, under torchrun, it is torchtitan's own entry point, with a flavor of fewer layers where
PEER_N_LAYERS says so. Nothing else of Octavo runs in that process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.float8.training.settings import Settings

LAYERS_VARIABLE = "PEER_N_LAYERS"
FLAVOR_VARIABLE = "PEER_FLAVOR"
_ROOT = Path(__file__).resolve().parents[3]

_STEP = re.compile(
    r"step:\s*(?P<step>\d+)\s+loss:\s*(?P<loss>\S+)\s.*?memory:\s*(?P<gib>[\d.]+)GiB.*?tps:\s*(?P<tps>[\d,]+)"
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def command(settings: Settings, toml: Path) -> list[str]:
    """What starts it, on all GPUs of this host."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={settings.ngpu}"]
    quiet = ["--local-ranks-filter=0", "--role=rank", "--tee=3"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    mine = [str(Path(__file__).resolve()), f"--job.config_file={toml}"]
    return [*torchrun, *meeting, *quiet, *mine, *settings.peer_extra_args]


def environment(settings: Settings) -> dict[str, str]:
    """What the process needs beside this one's variables; Octavo's packages are not on its path."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    layers = {LAYERS_VARIABLE: str(settings.n_layers)} if settings.n_layers else {}
    return {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path and Path(path).resolve() != _ROOT),
        FLAVOR_VARIABLE: settings.flavor,
        **layers,
    }


def flavor_name(flavor: str, n_layers: int | str | None) -> str:
    """A flavor of fewer layers has a name of its own."""
    return f"{flavor}_{n_layers}L" if n_layers else flavor


def toml(settings: Settings, variant: str, data: Path, tokenizer: Path, dump_folder: Path) -> str:
    """The configuration of one variant: model, batch, optimizer and recompute as Octavo's runs have them."""
    float8 = variant not in ("eager", "bf16")
    model: dict[str, object] = {
        "name": "llama3",
        "flavor": flavor_name(settings.flavor, settings.n_layers),
        "hf_assets_path": str(tokenizer),
    }
    if float8:
        model["converters"] = ["quantize.linear.float8"]
    training: dict[str, object] = {
        "local_batch_size": settings.local_batch_size,
        "seq_len": settings.seq_len,
        "max_norm": 1.0,
        "steps": settings.steps,
        "dataset": "c4_test",
        "dataset_path": str(data),
    }
    if settings.accumulation > 1:
        training["global_batch_size"] = settings.global_batch_size
    checkpointing: dict[str, object] = {"mode": "selective", "selective_ac_option": "op"}
    if settings.ac != "op":
        checkpointing = {"mode": settings.ac}
    sections: dict[str, dict[str, object]] = {
        "job": {"dump_folder": str(dump_folder)},
        "metrics": {"log_freq": settings.log_freq, "disable_color_printing": True},
        "model": model,
        "optimizer": {"name": "AdamW", "lr": 3e-4},
        "lr_scheduler": {"warmup_steps": min(20, settings.steps)},
        "training": training,
        "parallelism": {"data_parallel_shard_degree": -1},
        "checkpoint": {"enable": False},
        "compile": {"enable": variant != "eager", "components": ["model", "loss"]},
        "activation_checkpoint": checkpointing,
    }
    if float8:
        section: dict[str, object] = {"filter_fqns": ["output"]}
        if variant == "tensorwise":
            section["enable_fsdp_float8_all_gather"] = True
            section["precompute_float8_dynamic_scale_for_fsdp"] = True
        elif variant.startswith("rowwise"):
            section["recipe_name"] = variant
        sections["quantize.linear.float8"] = section
    lines = []
    for name, values in sections.items():
        # JSON's strings, numbers, booleans and lists are TOML's too.
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def write_data(folder: Path) -> None:
    """Text from Python's own library, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    with (folder / "data.json").open("w") as file:
        for source in sources:
            file.write(json.dumps({"text": source.read_text(errors="ignore")}) + "\n")


def read_log(text: str) -> list[dict[str, float]]:
    """Rows of its step lines: step, loss, memory_gib, tps."""
    rows = []
    for line in text.splitlines():
        found = _STEP.search(_COLOR.sub("", line))
        if found:
            rows.append(
                {
                    "step": int(found["step"]),
                    "loss": float(found["loss"]),
                    "memory_gib": float(found["gib"]),
                    "tps": float(found["tps"].replace(",", "")),
                }
            )
    return rows


def _main() -> None:
    # A script's own folder is on its path, and torchtitan's imports must not find Octavo's modules there.
    sys.path[:] = [
        path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
    ]
    import dataclasses

    from torchtitan.models.llama3 import llama3_args
    from torchtitan.train import Trainer, main

    flavor, layers = os.environ[FLAVOR_VARIABLE], os.environ.get(LAYERS_VARIABLE)
    if layers:
        shorter = dataclasses.replace(llama3_args[flavor], n_layers=int(layers))
        llama3_args[flavor_name(flavor, layers)] = shorter
    main(Trainer)


if __name__ == "__main__":
    _main()
