"""Context parallelism: each sequence is spread over the ranks of the ``cp`` axis.

    tokens, labels, residual stream    each rank holds T = S/cp positions of each sequence
    norms, linears, loss               work on the own positions; nothing travels
    attention                          keys and values visit all ranks (`parallelisms.ring_attention`)
    RoPE                               a table of the own positions
    weights                            FSDP2 shards and sums over dp_shard x cp together

A rank holds chunks r and 2 cp - 1 - r of 2 cp equal ones (``headtail``), so that causal work is even, or
chunk r of cp (no load balancer).

Masks of documents need more than the causal order: then keys and values of all positions are gathered, put
in order of position, and the model's own masked attention runs with this rank's queries (the all-gather form
of Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2). In backward their gradients are summed in fp32.

What a model brings: the FQN pattern of its attention modules, ``forward(q, k, v, mask)`` with heads before
positions, and modules with ``set_positions`` where an operation depends on the position.

Legend: B sequences, S positions, T own positions, H_kv key heads, Dh head width, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from kernels.operators import operator
from parallelisms.blocks import matches
from parallelisms.config import ParallelismConfig
from parallelisms.ring_attention import ring_attention

_c10d = torch.ops._c10d_functional


def apply_context_parallel(
    model: nn.Module, attention: str, cp_mesh: DeviceMesh, config: ParallelismConfig
) -> str:
    """Let the attention modules of `model` see the whole sequence; returns what was done, for the log.

    Args:
        model: Converted and split by tensor parallelism, not yet wrapped by anything; or a pipeline stage.
        attention: FQN pattern of its attention modules.
        cp_mesh: The one-dimensional ``cp`` part of the device mesh.
        config: How keys and values travel, and which chunks a rank holds.
    """
    if cp_mesh.size() == 1:
        return ""
    modules = [module for fqn, module in model.named_modules() if matches(attention, fqn)]
    group, rotate = cp_mesh.get_group().group_name, config.context_parallel_rotate_method
    balanced = _is_balanced(config)
    for module in modules:
        module.forward = _over_ranks(module, group, rotate, balanced)  # type: ignore[method-assign]
    held = "a head and a tail chunk" if balanced else "one chunk"
    return (
        f"context parallel over {cp_mesh.size()}: {len(modules)} attentions in a ring ({rotate}), "
        f"{held} of each sequence per rank"
    )


def check_attention(model: nn.Module, attention: str) -> None:
    """Raise ValueError where the pattern matches no module of the whole model; a stage may have none."""
    if not any(matches(attention, fqn) for fqn, _ in model.named_modules()):
        raise ValueError(f"context parallel: the attention pattern {attention!r} matches no module")


def _over_ranks(module: nn.Module, group: str, rotate: str, balanced: bool) -> Callable[..., Tensor]:
    masked, backend = module.forward, getattr(module, "backend", "auto")

    def attend_over_ranks(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        if mask is None:
            return ring_attention(q, k, v, group, rotate, balanced, backend)[0]
        k, v = gather_sequence(torch.stack((k, v)), group, balanced).unbind()
        return masked(q, k, v, mask)

    return attend_over_ranks


class SequenceShards:
    """What this rank holds of each sequence. With one rank: all of it, and nothing is done."""

    def __init__(self, models: Iterable[nn.Module], cp_mesh: DeviceMesh, config: ParallelismConfig) -> None:
        self.mesh, self.balanced = cp_mesh, _is_balanced(config)
        self._length = 0
        self._positioned = [
            module for model in models for module in model.modules() if hasattr(module, "set_positions")
        ]

    def shard(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The own positions of each (B, S) tensor; the models then work on positions of that length S."""
        if self.mesh.size() == 1:
            return tensors
        S = tensors[0].shape[1]
        if self._length != S:  # training and validation may differ
            for module in self._positioned:
                module.set_positions(self.positions(S))
            self._length = S
        chunks = _chunks_of(self.mesh.get_local_rank(), self.mesh.size(), self.balanced)
        count = 2 * self.mesh.size() if self.balanced else self.mesh.size()
        return tuple(torch.cat([t.chunk(count, 1)[c] for c in chunks], 1) for t in tensors)

    def positions(self, S: int) -> Tensor:
        """(T,) int64: the own positions of sequences of S, in order."""
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        count = 2 * size if self.balanced else size
        assert S % count == 0, (S, count)
        every = torch.arange(S, device="cpu").view(count, -1)
        return every[_chunks_of(rank, size, self.balanced)].flatten()


@operator("gather_sequence")
def gather_sequence(kv: Tensor, group: str, balanced: bool) -> Tensor:
    """Keys and values of all positions, in order: (2, B, H_kv, T, Dh) -> (2, B, H_kv, S, Dh)."""
    size, _ = _place(group)
    gathered = _c10d.wait_tensor(_c10d.all_gather_into_tensor(kv.contiguous(), size, group))
    parts = gathered.view(size, *kv.shape).chunk(2 if balanced else 1, dim=4)
    chunks: list[Any] = [None] * (size * len(parts))
    for rank in range(size):
        for part, chunk in zip(parts, _chunks_of(rank, size, balanced), strict=True):
            chunks[chunk] = part[rank]
    return torch.cat(chunks, dim=3)


@operator("scatter_sequence_sum")
def scatter_sequence_sum(grad: Tensor, group: str, balanced: bool) -> Tensor:
    """The own positions' sum over ranks, in fp32: (2, B, H_kv, S, Dh) -> (2, B, H_kv, T, Dh)."""
    size, _ = _place(group)
    chunks = grad.to(torch.promote_types(grad.dtype, torch.float32)).chunk(
        size * (2 if balanced else 1), dim=3
    )
    parts = [torch.cat([chunks[c] for c in _chunks_of(rank, size, balanced)], 3) for rank in range(size)]
    summed = _c10d.reduce_scatter_tensor(torch.cat(parts), "sum", size, group)
    return _c10d.wait_tensor(summed).to(grad.dtype)


@gather_sequence.register_fake
def _(kv: Tensor, group: str, balanced: bool) -> Tensor:
    lead, T, Dh = kv.shape[:3], kv.shape[3], kv.shape[4]
    return kv.new_empty(*lead, T * _place(group)[0], Dh)


@scatter_sequence_sum.register_fake
def _(grad: Tensor, group: str, balanced: bool) -> Tensor:
    lead, S, Dh = grad.shape[:3], grad.shape[3], grad.shape[4]
    return grad.new_empty(*lead, S // _place(group)[0], Dh)


def _save_options(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _scatter_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_sequence_sum(grad, *ctx.options), None, None


gather_sequence.register_autograd(_scatter_gradient, setup_context=_save_options)


def _is_balanced(config: ParallelismConfig) -> bool:
    return config.context_parallel_load_balancer is not None


def _chunks_of(rank: int, size: int, balanced: bool) -> list[int]:
    return [rank, 2 * size - 1 - rank] if balanced else [rank]


def _place(group: str) -> tuple[int, int]:
    process_group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return process_group.size(), process_group.rank()
