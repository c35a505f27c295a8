"""FSDP2: parameters, gradients and optimizer state sharded over data-parallel ranks.

Units, each gathered as one: every block; the embedding; [norm, output] together, which stay gathered between
forward and backward because backward needs them first. Where the output is tied to the embedding, these
three are one unit, since they share a parameter. (Zhao et al. 2023, arXiv 2304.11277.)

World size 1 takes the same path: the same mixed-precision policy, the same hooks, nothing to send.

Gradients are summed over ranks, not averaged: the loss is divided by the global number of tokens already.
How they travel and where they lie: `parallelisms.fsdp_comm`.

The embedding's backward reads token ids and no weight, so an untied embedding is not gathered for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from parallelisms.blocks import blocks_of
from parallelisms.fsdp_comm import GradientReduceScatter
from parallelisms.fsdp_copies import PeerAllGather
from parallelisms.peer_memory import PeerMemory
from parallelisms.uncast import cast_when_copied


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
    reduce_scatter: str = "torch",
    accumulates: bool = False,
    gathers_embedding: bool = True,
    transport: str = "nccl",
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
        reduce_scatter: ``parallelism.fsdp_reduce_scatter``.
        accumulates: Several micro-batches a step, each with a reduction over the shards.
        gathers_embedding: False, on one device: FSDP2 leaves an embedding that is not tied alone, but for the
            form of its parameter; see `parallelisms.direct_weights`.
        transport: ``parallelism.fsdp_transport``.

    Returns:
        What was done, for the start-up log.
    """
    replicas, shards = (1, *mesh.shape)[-2:]
    wire = param_dtype if reduce_scatter == "bfloat16_wire" and shards > 1 else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=wire or reduce_dtype)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    units, ignored = _units(model, blocks, roles, reshard_after_forward), set[nn.Parameter]()
    if not gathers_embedding and not units[0].backward_reads_weights:
        ignored = {_as_shard(module, mesh) for module in units.pop(0).modules}
    for unit in units:
        first = fully_shard(unit.modules, reshard_after_forward=unit.reshards, **options)[0]
        first.set_unshard_in_backward(unit.backward_reads_weights)
    root = fully_shard(model, reshard_after_forward=reshard_after_forward, ignored_params=ignored, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            if replicas * shards > 1:  # alone, a factor would cost a division by it
                module.set_gradient_divide_factor(1.0)
            if not cpu_offload:
                cast_when_copied(module)
    copies = transport == "copy_engine" and shards > 1
    if reduce_scatter != "torch":
        temporary = cpu_offload or (replicas > 1 and accumulates)
        peers = peer_memory(mesh) if copies and wire is not None else None
        # Replicas add to what is summed here.
        squares = wire is not None and replicas == 1 and not temporary and _norms_are_fp32(mesh)
        for modules in ([root], *(unit.modules for unit in units)):
            GradientReduceScatter(
                modules,
                shards=shards,
                temporary=temporary,
                wire_dtype=wire,
                peers=peers,
                squares=squares,
                last=modules is units[0].modules,
            ).install()
    if copies and not reshard_after_forward:
        peers = peer_memory(mesh, pieces=2)  # the next unit's beside the present one's
        for unit in units:
            PeerAllGather(unit.modules[0], peers)
    return _describe(mesh, len(units), param_dtype, reduce_dtype, reduce_scatter, copies)


def peer_memory(mesh: DeviceMesh, pieces: int = 1) -> PeerMemory:
    """Memory for copies between the ranks that `mesh` shards over, its last axis; see `check_peers`."""
    return PeerMemory(mesh.get_group(mesh.ndim - 1), pieces)


def _norms_are_fp32(mesh: DeviceMesh) -> bool:
    """A CPU's are not (`kernels.norm`), so there they are not made of sums in fp32."""
    return mesh.device_type == "cuda"


def set_replica_all_reduce(model: nn.Module, needed: bool) -> None:
    """Whether the next backward also sums over replicas: once a step is enough (shards sum every time)."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(needed)


@dataclass(frozen=True)
class _Unit:
    """What is gathered as one."""

    modules: list[nn.Module]
    reshards: bool
    """Freed after forward."""
    backward_reads_weights: bool = True


def _units(
    model: nn.Module, blocks: str, roles: Mapping[str, str], reshard_after_forward: bool
) -> list[_Unit]:
    """All units of `model` but for what is left to the root, which should be nothing."""
    embedding, head = _outside_blocks(model, roles)
    found = [_Unit([block], reshard_after_forward) for _, block in blocks_of(model, blocks)]
    if _share_parameters(embedding, head):
        return [_Unit([*embedding, *head], False), *found]
    if head:
        found.insert(0, _Unit(head, False))
    if embedding:
        found.insert(0, _Unit(embedding, reshard_after_forward, backward_reads_weights=False))
    return found


def _as_shard(module: nn.Module, mesh: DeviceMesh) -> nn.Parameter:
    """Make the weight of `module` a DTensor over one shard, as FSDP2's parameters are."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    whole = DTensor.from_local(weight.detach(), mesh, [Shard(0)] * mesh.ndim, run_check=False)
    module.weight = nn.Parameter(whole, requires_grad=weight.requires_grad)
    return module.weight


def _describe(
    mesh: DeviceMesh,
    units: int,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reduce_scatter: str,
    copies: bool,
) -> str:
    kind, over = "HSDP" if mesh.ndim == 2 else "FSDP", " x ".join(str(size) for size in mesh.shape)
    if mesh.ndim == 2 and mesh.shape[1] == 1:
        kind, over = "DDP", str(mesh.shape[0])
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    how = {"torch": "", "compute_pool": " in the compute pool", "bfloat16_wire": " after travelling in bf16"}
    if copies:
        how["bfloat16_wire"] += " by copies between GPUs"
    if mesh.shape[-1] == 1:
        how["bfloat16_wire"] = " in the compute pool (of one shard nothing travels)"
    return (
        f"{kind} over {over}: {units} units, "
        f"compute {names[param_dtype]}, gradients summed in {names[reduce_dtype]}{how[reduce_scatter]}"
    )


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
