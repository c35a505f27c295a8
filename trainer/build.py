"""From a configuration to a model that can train: the one order, as code.

    model on meta -> converters -> tensor parallel -> activation checkpointing
    -> compile per block -> FSDP2 -> materialise

Each line below is one step and returns what it did; the order is part of the design. Converters come first
because they swap modules; tensor parallelism splits the modules that are then there; checkpointing wraps a
block's forward before the compiler sees it; FSDP comes last because it shards what the others made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from converters import CONVERTERS, ConversionReport, Converter, ConverterContext
from models import MODELS
from models.spec import FlopInputs
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.compile import apply_compile
from parallelisms.fsdp import apply_fsdp
from parallelisms.mesh import Mesh
from parallelisms.tensor_parallel import apply_async_tensor_parallel, apply_tensor_parallel
from trainer.config.checks import model_config
from trainer.config.errors import ConfigError, Problem
from trainer.config.job import JobConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to train, and what was done to it."""

    model: nn.Module
    converters: list[Converter]
    reports: list[ConversionReport]
    flop_inputs: FlopInputs
    notes: list[str]
    """One line per step of the build that did something or could have, for the start-up log."""


def build_model(config: JobConfig, mesh: Mesh, device: torch.device, seed: int) -> BuiltModel:
    """Build, convert, wrap and initialise the model of `config`.

    Raises:
        ConfigError: a converter cannot work with these settings.
    """
    spec = MODELS[config.model.name]
    sizes = model_config(config)
    with torch.device("meta"):
        model = spec.build(sizes).to(DTYPES[config.training.dtype])
    converters, reports = _convert(model, config, mesh, device)
    notes = [
        apply_tensor_parallel(
            model,
            spec.roles,
            mesh.device_mesh["tp"],
            style_for=partial(_converter_style, converters),
            loss_parallel=not config.parallelism.disable_loss_parallel,
        ),
        apply_async_tensor_parallel(
            mesh.device_mesh["tp"], wanted=config.parallelism.enable_async_tensor_parallel
        ),
        apply_activation_checkpoint(
            model,
            spec.blocks,
            config.activation_checkpoint,
            [op for converter in converters for op in converter.ops_to_save()],
        ),
        apply_compile(model, spec.blocks, config.compile),
        apply_fsdp(
            model,
            spec.blocks,
            spec.roles,
            mesh.fsdp,
            param_dtype=DTYPES[config.training.mixed_precision_param],
            reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
            reshard_after_forward=config.parallelism.fsdp_reshard_after_forward != "never",
            cpu_offload=offloads(config, device),
        ),
    ]
    _materialise(model, torch.device("cpu") if offloads(config, device) else device, device, seed)
    return BuiltModel(model, converters, reports, spec.flop_inputs(sizes), [note for note in notes if note])


def offloads(config: JobConfig, device: torch.device) -> bool:
    """Whether parameters live in host memory: asked for, and the device is not the host itself."""
    return config.training.enable_cpu_offload and device.type != "cpu"


def _convert(
    model: nn.Module, config: JobConfig, mesh: Mesh, device: torch.device
) -> tuple[list[Converter], list[ConversionReport]]:
    context = ConverterContext(
        device_type=device.type,
        tokens_per_microbatch=config.training.local_batch_size * config.training.seq_len,
        tp_degree=mesh.degrees["tp"],
        dp_shard_degree=mesh.degrees["dp_shard"],
        compile_model=config.compile.enable and "model" in config.compile.components,
        roles=MODELS[config.model.name].roles,
    )
    converters, reports = [], []
    for name in config.model.converters:
        row = CONVERTERS[name]
        section: Any = config
        for part in row.section.split("."):
            section = getattr(section, part)
        try:
            converter = row.build(section, context)
            reports.append(converter.convert(model))
        except ValueError as error:
            raise ConfigError([Problem(f"[{row.section}]", str(error))]) from None
        converters.append(converter)
    return converters, reports


def _converter_style(converters: list[Converter], fqn: str, module: nn.Module, role: str) -> Any | None:
    """The tensor-parallel style of the converter that made `module`, if one did."""
    styles = (converter.parallel_style(fqn, module, role) for converter in converters)
    return next((style for style in styles if style is not None), None)


def _materialise(model: nn.Module, storage: torch.device, compute: torch.device, seed: int) -> None:
    """Give the shards memory on `storage` and fill them: the same weights for a seed under every layout.

    Buffers (RoPE tables, scales) are not sharded and not offloaded: they lie where the compute is.
    """
    model.to_empty(device=storage)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights(draw_on=compute)  # type: ignore[operator]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(compute)
    model.train()
