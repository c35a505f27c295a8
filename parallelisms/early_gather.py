"""Gather what forward reads first while the optimizer is busy with the rest.

A step begins with gathers that nothing can hide: FSDP2 lets them begin when the optimizer is done, and
forward waits for the embedding's, the largest unit but one (Llama 3 8B in bf16: 1 GB, some 4 ms over NVLink),
and for the first block's. But an optimizer that updates these two first (`trainer.optim.one_pass`: ``first``,
and ``first_updated``, an event) leaves time for it, the 23 ms that the other weights of 8B take on two GPUs:

    compute    [ embedding, block 0 | all other weights .......... ]  forward
    gather                          [ embedding ][ block 0 ]       [ block 1 ...

The gathers are asked for where forward begins, by when the host is ahead of the GPU, so nothing can come
between. Weights that somebody else has written since are gathered as ever. A block whose weights travel in
float8 waits for the optimizer: their scales are made of all ranks' amaxes, one reduction for all weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from parallelisms.blocks import blocks_of
from parallelisms.dtensor import local_part


def gather_early(model: nn.Module, blocks: str, optimizer: Optimizer) -> bool:
    """Have every forward of `model` after a step of `optimizer` gather its first units early.

    Args:
        model: After `parallelisms.fsdp.apply_fsdp`, all of it on this rank (no pipeline).
        blocks: FQN of its block list.
        optimizer: Over its parameters.

    Returns:
        Whether it will: not where the optimizer cannot, and not where nothing travels or shards are on the
        host.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    _, first_block = next(blocks_of(model, blocks))
    units = []
    for module in (*embeddings, first_block):
        if not (isinstance(module, FSDPModule) and _can_be_early(module)):
            break
        units.append(module)
    if not units or not hasattr(optimizer, "first"):
        return False
    optimizer.first.update(weight for unit in units for weight in _weights(unit))
    optimizer.register_step_post_hook(_Gatherer(model, units, optimizer).after_step)
    return True


def _can_be_early(unit: FSDPModule) -> bool:
    """Whether it has several shards, on the device, that travel as the optimizer leaves them."""
    group = unit._get_fsdp_state()._fsdp_param_group
    return (
        group is not None
        and group.mesh_info.shard_mesh_size > 1
        and all(weight.device.type == group.device.type for weight in _weights(unit))
        and not any(hasattr(local_part(weight), "fsdp_pre_all_gather") for weight in _weights(unit))
    )


def _weights(unit: FSDPModule) -> list[Tensor]:
    """All that is gathered with it, which may be other modules' too; sharded."""
    group = unit._get_fsdp_state()._fsdp_param_group
    places = [] if group is None else [parameter._module_info for parameter in group.fsdp_params]
    return [getattr(place.module, place.param_name) for place in places]


class _Gatherer:
    """Does what the module says for `units` of `model`."""

    def __init__(self, model: nn.Module, units: list[FSDPModule], optimizer: Optimizer) -> None:
        self._units, self._optimizer = units, optimizer
        self._updated: list[int] | None = None
        """Versions of the weights after the last step; None when they have been gathered since."""
        model.register_forward_pre_hook(self._before_forward, prepend=True)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Of the optimizer."""
        self._updated = self._versions()

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        updated, self._updated = self._updated, None
        if updated is None or updated != self._versions():
            return
        event: torch.cuda.Event | None = self._optimizer.first_updated  # type: ignore[attr-defined]
        for unit in self._units:
            if event is None:  # a CPU's
                unit.unshard(async_op=True)
                continue
            # FSDP2's own stream, so that buffers come out of the pool that gathers use anyway.
            stream = unit._get_fsdp_state()._comm_ctx.all_gather_copy_in_stream
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                unit.unshard(async_op=True)

    def _versions(self) -> list[int]:
        return [local_part(weight)._version for unit in self._units for weight in _weights(unit)]
