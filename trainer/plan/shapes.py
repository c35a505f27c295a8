"""The model as it will be split: built on ``meta`` and converted as for a run, then read.

Shapes follow from the role table, as in `parallelisms.tensor_parallel` and `parallelisms.fsdp`: tensor
parallelism cuts rows of columnwise weights, of the embedding and of the output, and columns of rowwise
ones; FSDP cuts the rows of what is then left, each parameter for itself, the last shard padded.

Legend: D model width, N and K out and in features of a linear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from converters import ConversionReport
from converters.float8.linear import Float8Linear
from converters.float8.tensor_parallel import one_dynamic_scale
from models import MODELS
from models.attention import InnerAttention
from models.spec import FlopInputs
from parallelisms.blocks import blocks_of, matches
from trainer.build import DTYPES, convert_model
from trainer.config.derived import model_config
from trainer.plan.layout import Layout

_TP_DIM = {"embedding": 0, "columnwise": 0, "output": 0, "rowwise": 1}
"""Role -> dim of the weight that tensor parallelism cuts; others are whole on every rank."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, or all that are alike in every block."""

    fqn: str
    role: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    """After tensor parallelism: what a rank computes with."""
    shard_shape: tuple[int, ...]
    """After FSDP: what a rank keeps (the first rank, whose part is the largest)."""
    gather_bytes_per_element: int
    """What FSDP sends of it and holds while it is gathered."""
    count: int = 1

    @property
    def numel(self) -> int:
        """Elements of one, over all ranks."""
        return prod(self.shape)

    @property
    def local_numel(self) -> int:
        """Elements of one that a rank computes with."""
        return prod(self.local_shape)

    @property
    def shard_numel(self) -> int:
        """Elements of one that a rank keeps."""
        return prod(self.shard_shape)


@dataclass(frozen=True)
class LinearShape:
    """One linear of a block as a rank computes it."""

    name: str
    role: str
    k: int
    n: int
    float8: bool
    high_precision_weight_gradient: bool
    """Its weight's gradient is a GEMM in the compute dtype, so its input is kept in it."""
    float8_gather: bool
    """Under tensor parallelism its input (columnwise) or output's gradient (rowwise) travels in float8."""
    recomputed: bool
    """Named by per_op_sac_force_recompute_mm_shapes_by_fqns."""


@dataclass(frozen=True)
class Part:
    """Attention or feed-forward: linears that read one normed input, and those that write to the residual."""

    is_attention: bool
    columnwise: tuple[LinearShape, ...]
    rowwise: tuple[LinearShape, ...]


@dataclass(frozen=True)
class BlockShape:
    """A block as a rank computes it."""

    width: int
    heads: int
    parts: tuple[Part, ...]

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """All of them in the order in which they run."""
        return tuple(linear for part in self.parts for linear in (*part.columnwise, *part.rowwise))

    def recomputed_per_op(self) -> frozenset[str]:
        """Linears whose product ``selective`` with ``op`` makes again: every second, and those named."""
        counted = [linear.name for linear in self.linears if not linear.recomputed]
        return frozenset(counted[1::2]).union(linear.name for linear in self.linears if linear.recomputed)


@dataclass(frozen=True)
class ModelShape:
    """All that the plan needs to know of the model."""

    embedding: tuple[Parameter, ...]
    block: tuple[Parameter, ...]
    """Of one block: all are alike."""
    head: tuple[Parameter, ...]
    n_layers: int
    tied_output: bool
    sizes: BlockShape
    vocabulary: int
    flop_inputs: FlopInputs
    reports: tuple[ConversionReport, ...]

    @property
    def parameters(self) -> int:
        """All parameters over all ranks; a tied weight counts once."""
        return self.flop_inputs.parameters


def read_model(config: Any, layout: Layout, device_type: str) -> ModelShape:
    """Build the model of `config` on ``meta``, convert it and read its shapes.

    Raises:
        ConfigError: a converter cannot work with these settings.
    """
    spec = MODELS[config.model.name]
    with torch.device("meta"):
        model = spec.build(model_config(config)).to(DTYPES[config.training.dtype])
    _, reports = convert_model(model, config, layout, torch.device(device_type))
    roles = {pattern: str(getattr(role, "value", role)) for pattern, role in spec.roles.items()}
    element = 2 if config.training.mixed_precision_param == "bfloat16" else 4
    inputs = spec.flop_inputs(model_config(config))

    def read(module: nn.Module, prefix: str) -> tuple[Parameter, ...]:
        return tuple(_parameters(module, prefix, roles, layout, element))

    named = list(blocks_of(model, spec.blocks))
    outside = {fqn: module for fqn, module in model.named_children() if fqn in roles}
    first = [fqn for fqn in outside if roles[fqn] == "embedding"]
    embedding = tuple(p for fqn in first for p in read(outside[fqn], fqn))
    head = [p for fqn in outside if fqn not in first for p in read(outside[fqn], fqn)]
    if inputs.tied_output:
        head = [p for p in head if p.role != "output"]
    fqn, block = named[0]
    skip = config.activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns
    return ModelShape(
        embedding,
        read(block, fqn),
        tuple(head),
        len(named),
        inputs.tied_output,
        BlockShape(
            embedding[0].shape[1], inputs.n_heads // layout.tp, _parts(block, fqn, roles, layout, skip)
        ),
        embedding[0].shape[0],
        inputs,
        tuple(reports),
    )


def fold(fqn: str) -> str:
    """``layers.3.attention.wq`` -> ``layers.*.attention.wq``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", fqn)


def _role(fqn: str, roles: dict[str, str]) -> str:
    return next((role for pattern, role in roles.items() if matches(pattern, fqn)), "replicated")


def _parameters(
    module: nn.Module, prefix: str, roles: dict[str, str], layout: Layout, element: int
) -> list[Parameter]:
    found = []
    for name, child in module.named_modules():
        owner = f"{prefix}.{name}" if name else prefix
        for leaf, parameter in child.named_parameters(recurse=False):
            role = _role(owner, roles)
            local = list(parameter.shape)
            if role in _TP_DIM and _TP_DIM[role] < len(local):
                local[_TP_DIM[role]] //= layout.tp
            shard = [-(-local[0] // layout.fsdp_degree), *local[1:]]
            float8 = isinstance(child, Float8Linear) and child.config.enable_fsdp_float8_all_gather
            sent = 1 if float8 and leaf == "weight" else element
            found.append(
                Parameter(
                    fold(f"{owner}.{leaf}"), role, tuple(parameter.shape), tuple(local), tuple(shard), sent
                )
            )
    return found


def _parts(
    block: nn.Module, prefix: str, roles: dict[str, str], layout: Layout, recomputed: list[str]
) -> tuple[Part, ...]:
    """The block's linears by the module that holds them, in the order in which they run."""
    order = list(roles)
    groups: dict[str, list[LinearShape]] = {}
    for name, module in block.named_modules():
        fqn = f"{prefix}.{name}"
        role = _role(fqn, roles)
        if isinstance(module, nn.Linear) and role in ("columnwise", "rowwise"):
            groups.setdefault(name.rpartition(".")[0], []).append(
                _linear(name, fqn, module, role, layout.tp, any(part in fqn for part in recomputed))
            )
    parts = []
    for parent, linears in groups.items():
        linears.sort(key=lambda linear: order.index(_pattern(f"{prefix}.{linear.name}", roles)))
        children = block.get_submodule(parent).modules() if parent else ()
        parts.append(
            Part(
                any(isinstance(child, InnerAttention) for child in children),
                tuple(linear for linear in linears if linear.role == "columnwise"),
                tuple(linear for linear in linears if linear.role == "rowwise"),
            )
        )
    return tuple(parts)


def _pattern(fqn: str, roles: dict[str, str]) -> str:
    return next(pattern for pattern in roles if matches(pattern, fqn))


def _linear(name: str, fqn: str, module: nn.Linear, role: str, tp: int, recomputed: bool) -> LinearShape:
    k, n = module.in_features, module.out_features
    if role == "columnwise":
        n //= tp
    else:
        k //= tp
    if not isinstance(module, Float8Linear):
        return LinearShape(name, role, k, n, False, True, False, recomputed)
    config = module.config
    gradient = config.cast("cast_config_grad_output_for_grad_weight")
    travels = one_dynamic_scale(config, "input" if role == "columnwise" else "grad_output")
    return LinearShape(name, role, k, n, True, not gradient.enabled, travels, recomputed)
