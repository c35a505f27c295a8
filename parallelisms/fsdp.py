"""FSDP2: parameters, gradients and optimizer state sharded over data-parallel ranks.

Units, each gathered as one: every block; the embedding; [norm, output] together, which stay gathered between
forward and backward because backward needs them first. Where the output is tied to the embedding, these
three are one unit, since they share a parameter. (Zhao et al. 2023, arXiv 2304.11277.)

World size 1 takes the same path: the same mixed-precision policy, the same hooks, nothing to send.

Gradients are summed over ranks, not averaged: the loss is divided by the global number of tokens already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from parallelisms.blocks import blocks_of


def apply_fsdp(
    model: nn.Module,
    blocks: str,
    roles: Mapping[str, str],
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> str:
    """Shard `model` over `mesh`, one-dimensional (FSDP) or (replicate, shard) (HSDP).

    Args:
        model: On ``meta``, converted and compiled.
        blocks: FQN of its block list.
        roles: FQN pattern -> role; patterns without ``*`` are the modules outside the blocks.
        mesh: Data-parallel part of the device mesh.
        param_dtype: Dtype of forward and backward.
        reduce_dtype: Dtype in which gradients are summed.
        reshard_after_forward: Free a block's gathered weights after its forward.
        cpu_offload: Keep the shards in host memory.

    Returns:
        What was done, for the start-up log.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    embedding, head = _outside_blocks(model, roles)
    units = 1
    if _share_parameters(embedding, head):
        fully_shard([*embedding, *head], reshard_after_forward=False, **options)
    else:
        for group, reshard in ((embedding, reshard_after_forward), (head, False)):
            if group:
                fully_shard(group, reshard_after_forward=reshard, **options)
                units += 1
    for _, block in blocks_of(model, blocks):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        units += 1
    fully_shard(model, reshard_after_forward=reshard_after_forward, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    kind = "HSDP" if mesh.ndim == 2 else "FSDP"
    over = " x ".join(str(size) for size in mesh.shape)
    if mesh.ndim == 2 and mesh.shape[1] == 1:
        kind, over = "DDP", str(mesh.shape[0])
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    return (
        f"{kind} over {over}: {units} units, "
        f"compute {names[param_dtype]}, gradients summed in {names[reduce_dtype]}"
    )


def set_replica_all_reduce(model: nn.Module, needed: bool) -> None:
    """Whether the next backward also sums over replicas: once a step is enough (shards sum every time)."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(needed)


def _outside_blocks(model: nn.Module, roles: Mapping[str, str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """(embedding modules, head modules) that this model (or pipeline stage) has."""
    embedding: list[nn.Module] = []
    head: list[nn.Module] = []
    for fqn, role in roles.items():
        module = None if "*" in fqn else getattr(model, fqn, None)
        if module is not None:
            (embedding if role == "embedding" else head).append(module)
    return embedding, head


def _share_parameters(first: list[nn.Module], second: list[nn.Module]) -> bool:
    mine = {id(p) for module in first for p in module.parameters()}
    return any(id(p) in mine for module in second for p in module.parameters())
