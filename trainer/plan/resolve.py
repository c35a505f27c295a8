"""Turn `activation_checkpoint.mode = "auto"` into a mode, on the devices that the run is on."""

from __future__ import annotations

import logging
from dataclasses import replace
from math import prod

import torch
import torch.distributed as dist

from trainer.config.job import JobConfig
from trainer.metrics.devices import DEVICES, Device, find_device
from trainer.plan import auto
from trainer.plan.layout import build_layout, build_stages
from trainer.plan.shapes import read_model


def resolve_recompute(
    config: JobConfig, degrees: dict[str, int], device: torch.device
) -> tuple[JobConfig, str]:
    """(`config` with a mode in the place of ``auto``, what was chosen); unchanged where it asks for a mode.

    Every rank must call this: the smallest device of the run decides for all.
    """
    if config.activation_checkpoint.mode != "auto":
        return config, ""
    if device.type == "cpu":
        section = replace(config.activation_checkpoint, mode="none")
        note = "activation checkpointing: auto recomputes nothing on a CPU"
        return replace(config, activation_checkpoint=section), note
    name = torch.cuda.get_device_name(device)
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    return resolve_for(config, prod(degrees.values()), find_device(name), float(memory))


def resolve_for(
    config: JobConfig, world_size: int, row: Device | None, memory_bytes: float
) -> tuple[JobConfig, str]:
    """The same for devices of that memory.

    Args:
        config: Asks for ``auto``.
        world_size: Processes of the run.
        row: The device's row, whose rates price the recompute; an H100's where it has none.
        memory_bytes: Of the smallest device.
    """
    device = row or next(row for row in DEVICES if row.key == "h100")
    layout = build_layout(config, world_size, device.devices_per_host)
    logging.getLogger("converters").setLevel(logging.CRITICAL)  # the build will say it
    model = read_model(config, layout, "cuda")
    logging.getLogger("converters").setLevel(logging.NOTSET)
    stages = build_stages(config, layout, model.n_layers)
    chosen = auto.choose(auto.options(config, model, layout, stages, device), memory_bytes)
    section = auto.as_config(config.activation_checkpoint, chosen.recompute)
    note = f"activation checkpointing: {auto.describe(chosen, memory_bytes)}"
    return replace(config, activation_checkpoint=section), note
