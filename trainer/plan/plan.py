"""Everything at once: a checked configuration in, a `Plan` out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import checks, derived
from trainer.config.device_defaults import with_device_defaults
from trainer.config.errors import ConfigError, Problem
from trainer.config.load import Loaded
from trainer.metrics.devices import DEVICES, Device
from trainer.metrics.flops import flops_per_token
from trainer.plan import auto
from trainer.plan.auto import Option
from trainer.plan.communication import Traffic, plan_communication
from trainer.plan.layout import AXES, Layout, Stage, build_layout, build_stages
from trainer.plan.memory import GIB, MemoryPlan
from trainer.plan.memory_shape import plan_memory
from trainer.plan.shapes import ModelShape, read_model
from trainer.plan.step_time import StepTime, plan_time

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    name: str
    """Model and flavor, with overrides."""
    layout: Layout
    device: Device
    model: ModelShape
    stages: tuple[Stage, ...]
    flops_per_token: int
    option: Option
    """The activation checkpointing that will be used."""
    automatic: bool
    """Whether ``auto`` chose it."""
    options: tuple[Option, ...]
    """What else there is to choose from."""
    memory: tuple[MemoryPlan, ...]
    """Of every pipeline rank."""
    traffic: tuple[Traffic, ...]
    """Of the pipeline rank that communicates most."""
    time: StepTime | None
    checkpoint_bytes: int
    """Model and optimizer of one full checkpoint, all ranks."""
    model_bytes: int
    """The model alone, as the final model-only save writes it."""
    notes: tuple[str, ...]

    @property
    def device_bytes(self) -> float:
        """Memory of one device."""
        return self.device.memory_gib * GIB

    @property
    def worst(self) -> MemoryPlan:
        """The pipeline rank that needs most."""
        return max(self.memory, key=lambda plan: plan.reserved_bytes)

    @property
    def fits(self) -> bool:
        """True where every rank's peak is within what is usable of its device."""
        return self.option.fits(self.device_bytes)


def host_device() -> Device:
    """The CPU's row, with this machine's memory."""
    import psutil

    row = next(device for device in DEVICES if device.key == "cpu")
    return replace(row, memory_gib=psutil.virtual_memory().total / GIB)


def make_plan(loaded: Loaded, world_size: int, device: Device) -> Plan:
    """Plan the run that `loaded` describes.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    problems = checks.problems(loaded, world_size) + checks.unavailable(loaded)
    problems += _device_problems(loaded, device)
    kind = "cpu" if device.key == "cpu" else "cuda"
    if problems:
        raise ConfigError([*problems, *_converter_problems(loaded.config, kind)])
    gpus = kind == "cuda"
    peers = gpus and world_size <= device.devices_per_host
    config = with_device_defaults(loaded.config, kernels=gpus, world_size=world_size, peers=peers)
    layout = build_layout(config, world_size, device.devices_per_host)
    notes = tuple(checks.warnings(loaded))
    return _plan(config, layout, read_model(config, layout, kind), device, notes)


def _plan(config: Any, layout: Layout, model: ModelShape, device: Device, notes: tuple[str, ...]) -> Plan:
    stages = build_stages(config, layout, model.n_layers)
    found = auto.options(config, model, layout, stages, device)
    automatic = config.activation_checkpoint.mode == "auto"
    if automatic:
        option = found[0] if device.key == "cpu" else auto.choose(found, device.memory_gib * GIB)
    else:
        asked = auto.requested(config.activation_checkpoint)
        option = auto.price(config, model, layout, stages, device, asked)
    traffic = [plan_communication(config, model, layout, stage, option.recompute) for stage in stages]
    busiest = max(traffic, key=lambda items: sum(item.bytes for item in items))
    times = [
        plan_time(config, model, layout, stage, option.recompute, items, device)
        for stage, items in zip(stages, traffic, strict=True)
    ]
    known = [time for time in times if time is not None]
    master = _DTYPE_BYTES[config.training.dtype]
    return Plan(
        name=_name(config),
        layout=layout,
        device=device,
        model=model,
        stages=tuple(stages),
        flops_per_token=flops_per_token(model.flop_inputs, config.training.seq_len),
        option=option,
        automatic=automatic,
        options=tuple(found),
        memory=tuple(plan_memory(config, model, layout, stages, option.recompute)),
        traffic=tuple(busiest),
        time=max(known, key=lambda time: time.slowest_seconds) if known else None,
        checkpoint_bytes=3 * model.parameters * master,
        model_bytes=model.parameters * _DTYPE_BYTES[config.checkpoint.export_dtype],
        notes=notes,
    )


def _name(config: Any) -> str:
    overrides = ", ".join(f"{key}={value}" for key, value in config.model.overrides.items())
    return f"{config.model.name} {config.model.flavor}" + (f" with {overrides}" if overrides else "")


def _converter_problems(config: Any, device_type: str) -> Sequence[Problem]:
    """What converters refuse, looked for on one rank since the mesh may be among what is wrong."""
    training = config.training
    batch = derived.BatchArithmetic(training.local_batch_size, 1, 1, training.seq_len)
    try:
        read_model(config, Layout(1, dict.fromkeys(AXES, 1), batch, 1, 1), device_type)
    except ConfigError as error:
        return error.problems
    except (KeyError, ValueError, ArithmeticError, RuntimeError):
        pass  # there is no such model, or it cannot be built: the checks have said so
    return []


def _device_problems(loaded: Loaded, device: Device) -> Sequence[Problem]:
    """What the device cannot run, as training would find out on it."""
    config = loaded.config
    float8 = config.quantize.linear.float8
    converts = any(name in ("float8", "quantize.linear.float8") for name in config.model.converters)
    if not converts or float8.emulate or device.key == "cpu":
        return []
    rows = float8.recipe_name in ("rowwise", "rowwise_with_gw_hp")
    if device.peak_float8_tflops is not None and not (rows and not device.float8_rows):
        return []
    kind = "row-scaled float8" if rows and device.peak_float8_tflops else "float8"
    message = f"{device.key} has no {kind} GEMMs; quantize.linear.float8.emulate runs the numerics (slow)"
    return [loaded.problem("model.converters", message)]


def default_world_size() -> int:
    """NGPU x NNODES of the environment, as the launcher reads them; 1 where they are not set."""
    return int(os.environ.get("NGPU") or 1) * int(os.environ.get("NNODES") or 1)
