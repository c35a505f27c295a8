"""Activation checkpointing: what backward computes again rather than keeps.

Modes (Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198):

- ``none``: keep every activation;
- ``full``: keep each block's input only;
- ``selective`` with an integer n: ``full`` on every n-th block;
- ``selective`` with ``op``: in every block keep the results of the costly ops (`SAVED_OPS`) and, of matmuls,
  every second one in the order of forward, whatever their dtypes are; recompute the rest;
- ``memory_budget``: the compiler's partitioner solves for the given share of activation memory.

A block's `forward` is wrapped in place, so its FQNs stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallelisms.blocks import blocks_of
from parallelisms.config import ActivationCheckpointConfig
from parallelisms.dtensor import local_part
from parallelisms.ring_attention import RING_ATTENTION

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.linear.default, _aten._scaled_mm.default}
_SCALED_MM_ALIGNMENT = 16
"""`torch._scaled_mm` takes sizes divisible by this; others are padded."""

SAVED_OPS = {
    *_MATMULS,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    RING_ATTENTION,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""Ops whose results are worth their memory: costly to compute, or small."""


def apply_activation_checkpoint(
    model: nn.Module, blocks: str, config: ActivationCheckpointConfig, more_saved_ops: Iterable[Any] = ()
) -> str:
    """Wrap the blocks that `config` asks for; returns what was done, for the start-up log.

    `more_saved_ops` are a converter's own: an amax that must not be computed twice, for example. A matmul
    among them is counted with the others.
    """
    named = list(blocks_of(model, blocks))
    if config.mode == "none":
        return "activation checkpointing: none"
    if config.mode == "memory_budget":
        torch._functorch.config.activation_memory_budget = config.memory_budget
        torch._functorch.config.visualize_memory_budget_pareto = config.visualize_memory_budget_pareto
        return f"activation checkpointing: memory budget {config.memory_budget:g} (left to the compiler)"
    if config.mode == "selective" and config.selective_ac_option == "op":
        skip = config.per_op_sac_force_recompute_mm_shapes_by_fqns
        _wrap(
            (block for _, block in named),
            config,
            partial(_selective_context, _shapes(named, skip), SAVED_OPS.union(more_saved_ops)),
        )
        return f"activation checkpointing: per op, in {len(named)} of {len(named)} blocks"
    every = 1 if config.mode == "full" else int(config.selective_ac_option)
    # By the layer's number and not its place in the list, so that short pipeline stages get their share.
    chosen = [block for fqn, block in named if (int(fqn.rpartition(".")[2]) + 1) % every == 0]
    _wrap(chosen, config, None)
    return f"activation checkpointing: {len(chosen)} of {len(named)} blocks recomputed"


def _wrap(
    blocks: Iterable[nn.Module], config: ActivationCheckpointConfig, context: Callable[[], Any] | None
) -> None:
    options: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }
    if context is not None:
        options["context_fn"] = context
    for block in blocks:
        block.forward = _checkpointed(block.forward, options)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # torch 2.11 marks what a compiled block recomputes by walking its graph, and forgets what is inside of an
    # autograd function: nearly all of a float8 linear was kept. A policy is asked for every op.
    compiled = {"context_fn": _recompute_all, **options}

    # A plain function of this file: the compiler refuses to start in a frame of torch.utils.checkpoint.
    def checkpointed_forward(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, **compiled)
        return checkpoint(forward, *args, **options)

    return checkpointed_forward


def _recompute_all() -> Any:
    return create_selective_checkpoint_contexts(_always_recompute)


def _always_recompute(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def _shapes(named: Iterable[tuple[str, nn.Module]], fqns: Iterable[str]) -> set[tuple[int, int]]:
    """This rank's (K, N) of linears whose FQN holds one of `fqns`: their matmuls are always recomputed."""
    wanted = tuple(fqns)
    found = set()
    for block_fqn, block in named:
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear) and any(part in f"{block_fqn}.{name}" for part in wanted):
                n, k = local_part(linear.weight).shape
                found.add((k, n))
    return found


def _is_recomputed_shape(op: Any, weight: Tensor, shapes: set[tuple[int, int]]) -> bool:
    """Whether a matmul's second operand (K, N) is of one of `shapes`."""
    found = tuple(local_part(weight).shape)
    if op is not _aten._scaled_mm.default:
        return found in shapes
    return found in {(_padded(k), _padded(n)) for k, n in shapes}


def _padded(size: int) -> int:
    return size + -size % _SCALED_MM_ALIGNMENT


def _selective_context(recomputed_shapes: set[tuple[int, int]], saved_ops: set[Any]) -> Any:
    """Contexts for one block and one pass: each has its own count of matmuls."""
    seen = {"forward": 0, "recompute": 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS:
            if _is_recomputed_shape(op, args[1], recomputed_shapes):
                return CheckpointPolicy.PREFER_RECOMPUTE
            phase = "recompute" if context.is_recompute else "forward"
            seen[phase] += 1
            if seen[phase] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in saved_ops else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
