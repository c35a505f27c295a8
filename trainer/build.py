"""From a configuration to a model that can train: the one order, as code.

    model on meta -> converters -> pipeline stages -> tensor parallel -> context parallel
    -> activation checkpointing -> compile per block -> chunked loss -> FSDP2 -> materialise

Each line below is one step and returns what it did; the order is part of the design. Converters come first
because they swap modules, and see the whole model before it is cut into stages; tensor parallelism splits
the modules that are then there; context parallelism gives attention its ring, with the heads that are left;
checkpointing wraps a block's forward before the compiler sees it; a chunked loss runs what tensor parallelism
made of the output many times inside what FSDP sees as one call; FSDP comes last because it shards what the
others made.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed import ProcessGroup

from converters import CONVERTERS, ConversionReport, Converter, ConverterContext
from models import MODELS
from models.spec import FlopInputs
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.compile import apply_compile
from parallelisms.context_parallel import apply_context_parallel, check_attention
from parallelisms.direct_weights import DirectWeights
from parallelisms.fsdp import apply_fsdp
from parallelisms.mesh import Mesh
from parallelisms.pipeline_parallel import Activations, cut, merged
from parallelisms.pipeline_stages import StageLayout
from parallelisms.tensor_parallel import (
    apply_async_tensor_parallel,
    apply_tensor_parallel,
    check_roles,
    roles_within,
)
from trainer.checkpoint.state import model_tensors
from trainer.chunked_loss import apply_chunked_loss
from trainer.config.derived import batch_arithmetic, model_config
from trainer.config.errors import ConfigError, Problem
from trainer.config.job import JobConfig
from trainer.config.pipeline_checks import stages_of
from trainer.loss import build_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MeshLike(Protocol):
    """What conversion needs of a mesh, or of the plan of one."""

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree."""

    @property
    def layer_group(self) -> ProcessGroup | None:
        """As a `Mesh` has it."""

    @property
    def stage_group(self) -> ProcessGroup | None:
        """As a `Mesh` has it."""


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to train, and what was done to it."""

    model: nn.Module
    """All that this rank holds, under the FQNs of the whole model."""
    parts: list[nn.Module]
    """What runs: the model itself, or one module for each pipeline stage of this rank."""
    stages: StageLayout | None
    """Where the parts belong; None without a pipeline."""
    activations: Activations
    """What travels between stages."""
    fqns: frozenset[str]
    """FQNs of all parameters and persistent buffers of the whole model, on whatever stage they are."""
    wants_documents: bool
    """Whether `forward` is to be given document_ids."""
    direct: DirectWeights | None
    """Where weights and gradients are not copied; None where FSDP2 does what it does on many devices."""
    converters: list[Converter]
    reports: list[ConversionReport]
    flop_inputs: FlopInputs
    notes: list[str]
    """One line per step of the build that did something or could have, for the start-up log."""


def build_model(
    config: JobConfig, mesh: Mesh, device: torch.device, seed: int, *, fake: FakeTensorMode | None = None
) -> BuiltModel:
    """Build, convert, cut, wrap and initialise the model of `config`.

    In the `fake` mode of a dry run the result has shapes and no values.

    Raises:
        ConfigError: a converter cannot work with these settings.
    """
    from trainer.plan.resolve import resolve_recompute  # which plans with this module's convert_model

    config, recompute_note = resolve_recompute(config, mesh.degrees, device)
    spec = MODELS[config.model.name]
    sizes = model_config(config)
    with torch.device("meta"):
        model = spec.build(sizes).to(DTYPES[config.training.dtype])
    fqns = frozenset(model_tensors(model))
    activations = _activations(model, config, mesh)
    converters, reports = convert_model(model, config, mesh, device)
    parts, stages, notes = [model], None, [recompute_note]
    if mesh.degrees["cp"] > 1:
        check_attention(model, spec.attention)
    if mesh.degrees["pp"] > 1:
        check_roles(model, spec.roles)
        stages = stages_of(config, spec.flop_inputs(sizes).n_layers)
        parts = cut(model, spec.blocks, stages, mesh.device_mesh["pp"].get_local_rank())
        schedule = config.parallelism.pipeline_parallel_schedule
        notes.append(f"pipeline: {schedule}, {stages.count} stages: {stages.describe()}")
    for part in parts:
        notes += _wrap(part, config, mesh, device, converters)
        storage = torch.device("cpu") if offloads(config, device) else device
        with fake or nullcontext():
            _materialise(part, storage, device, None if fake else seed)
    direct = None
    if config.parallelism.fsdp_single_shard == "direct":
        direct = DirectWeights(model, DTYPES[config.training.mixed_precision_param])
    return BuiltModel(
        model=merged(parts, spec.blocks),
        parts=parts,
        stages=stages,
        activations=activations,
        fqns=fqns,
        wants_documents=getattr(sizes, "attn_mask_type", "causal") == "document",
        direct=direct,
        converters=converters,
        reports=reports,
        flop_inputs=spec.flop_inputs(sizes),
        notes=list(dict.fromkeys(note for note in notes if note)),  # the stages of a rank may be alike
    )


def _wrap(
    model: nn.Module, config: JobConfig, mesh: Mesh, device: torch.device, converters: list[Converter]
) -> list[str]:
    """Everything between conversion and memory, for the model or one stage of it; returns what was done."""
    spec = MODELS[config.model.name]
    roles = roles_within(model, spec.roles) if mesh.degrees["pp"] > 1 else spec.roles
    return [
        apply_tensor_parallel(
            model,
            roles,
            mesh.device_mesh["tp"],
            style_for=partial(_converter_style, converters),
            loss_parallel=not config.parallelism.disable_loss_parallel,
        ),
        apply_async_tensor_parallel(
            mesh.device_mesh["tp"], wanted=config.parallelism.enable_async_tensor_parallel
        ),
        apply_context_parallel(model, spec.attention, mesh.device_mesh["cp"], config.parallelism),
        apply_activation_checkpoint(
            model,
            spec.blocks,
            config.activation_checkpoint,
            [op for converter in converters for op in converter.ops_to_save()],
        ),
        apply_compile(model, spec.blocks, config.compile),
        apply_chunked_loss(
            model,
            spec.roles,
            config.training.loss_chunk_tokens,
            build_loss(config.training, config.compile),
        ),
        apply_fsdp(
            model,
            spec.blocks,
            spec.roles,
            mesh.fsdp,
            param_dtype=DTYPES[config.training.mixed_precision_param],
            reduce_dtype=_reduce_dtype(config),
            reshard_after_forward=config.parallelism.reshards_after_forward(mesh.fsdp.shape[-1]),
            cpu_offload=offloads(config, device),
            reduce_scatter=config.parallelism.fsdp_reduce_scatter,
            accumulates=_accumulates(config, mesh),
            gathers_embedding=config.parallelism.fsdp_single_shard != "direct",
            transport=config.parallelism.fsdp_transport,
        ),
    ]


def _reduce_dtype(config: JobConfig) -> torch.dtype:
    """Of sums over ranks; one device alone that sums nothing leaves gradients as they are."""
    training = config.training
    direct = config.parallelism.fsdp_single_shard == "direct"
    return DTYPES[training.mixed_precision_param if direct else training.mixed_precision_reduce]


def _accumulates(config: JobConfig, mesh: Mesh) -> bool:
    """Whether a step reduces gradients over the shards more than once; a pipeline reduces them at its end."""
    steps = batch_arithmetic(config, prod(mesh.degrees.values())).gradient_accumulation_steps
    return steps > 1 and mesh.degrees["pp"] == 1


def _activations(model: nn.Module, config: JobConfig, mesh: Mesh) -> Activations:
    """What travels between the stages of `model`, still whole."""
    roles = {str(role.value): fqn for fqn, role in MODELS[config.model.name].roles.items() if "*" not in fqn}
    return Activations(
        width=model.get_submodule(roles["embedding"]).weight.shape[1],  # type: ignore[union-attr,index]
        vocabulary=model.get_submodule(roles["output"]).weight.shape[0],  # type: ignore[union-attr,index]
        dtype=DTYPES[config.training.mixed_precision_param],
        sequence_parts=mesh.degrees["tp"],
        ends_with_loss=config.training.loss_chunk_tokens > 0,
    )


def offloads(config: JobConfig, device: torch.device) -> bool:
    """Whether parameters live in host memory: asked for, and the device is not the host itself."""
    return config.training.enable_cpu_offload and device.type != "cpu"


def convert_model(
    model: nn.Module, config: JobConfig, mesh: MeshLike, device: torch.device
) -> tuple[list[Converter], list[ConversionReport]]:
    """Apply the converters of `config` to a model on ``meta``; a planned mesh has degrees and no groups."""
    pipelined = mesh.degrees["pp"] > 1
    rows = (
        config.parallelism.pipeline_parallel_microbatch_size
        if pipelined
        else config.training.local_batch_size
    )
    context = ConverterContext(
        device_type=device.type,
        tokens_per_microbatch=rows * (config.training.seq_len // mesh.degrees["cp"]),
        tp_degree=mesh.degrees["tp"],
        dp_shard_degree=mesh.degrees["dp_shard"] * mesh.degrees["cp"],
        compile_model=config.compile.enable and "model" in config.compile.components,
        dry_run=config.comm.mode == "fake_backend",
        roles=MODELS[config.model.name].roles,
        layer_group=mesh.layer_group,
        stage_group=mesh.stage_group,
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


def _materialise(model: nn.Module, storage: torch.device, compute: torch.device, seed: int | None) -> None:
    """Give the shards memory on `storage` and fill them: the same weights for a seed under every layout.

    Without a seed nothing is filled.
    Buffers (RoPE tables, scales) are not sharded and not offloaded: they lie where the compute is.
    """
    model.to_empty(device=storage)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            model.init_weights(draw_on=compute)  # type: ignore[operator]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(compute)
    model.train()
