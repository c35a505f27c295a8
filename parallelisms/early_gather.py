"""Gather the embedding for the next forward while the optimizer is busy with the rest.

A step begins with the embedding's gather, and nothing can hide it: FSDP2 lets it begin when the optimizer is
done, and forward waits for its end. It is the largest unit but one (Llama 3 8B in bf16: 1 GB, some 4 ms over
NVLink). But an optimizer that updates the embedding first (`trainer.optim.one_pass`: ``first``, and
``first_updated``, an event) leaves time for it, the 23 ms that the other weights of 8B take on two GPUs:

    compute    [ embedding | all other weights ........ ]  forward
    gather                 [ embedding ]                 [ first block ...

The gather is asked for where forward begins, by when the host is ahead of the GPU, so nothing can come
between. Weights that somebody else has written since are gathered as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallelisms.dtensor import local_part


def gather_embedding_early(model: nn.Module, optimizer: Optimizer) -> bool:
    """Have every forward of `model` after a step of `optimizer` gather its embedding early.

    Args:
        model: After `parallelisms.fsdp.apply_fsdp`, all of it on this rank (no pipeline).
        optimizer: Over its parameters.

    Returns:
        Whether it will: not where the optimizer cannot, and not where the embedding has a single shard or its
        shards are on the host.
    """
    units = [m for m in model.modules() if isinstance(m, nn.Embedding) and isinstance(m, FSDPModule)]
    if len(units) != 1 or not hasattr(optimizer, "first"):
        return False
    weight, group = units[0].weight, units[0]._get_fsdp_state()._fsdp_param_group
    assert isinstance(weight, DTensor)
    assert group is not None
    if weight.device.type != weight.device_mesh.device_type or group.mesh_info.shard_mesh_size == 1:
        return False
    optimizer.first.add(weight)
    optimizer.register_step_post_hook(_Gatherer(model, units[0], optimizer).after_step)
    return True


class _Gatherer:
    """Does what the module says for `unit` of `model`."""

    def __init__(self, model: nn.Module, unit: nn.Embedding, optimizer: Optimizer) -> None:
        self._unit, self._optimizer = unit, optimizer
        self._updated: int | None = None
        """Version of the weight after the last step; None when it has been gathered since."""
        model.register_forward_pre_hook(self._before_forward, prepend=True)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Of the optimizer."""
        self._updated = self._shard._version

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        updated, self._updated = self._updated, None
        if updated is None or updated != self._shard._version:
            return
        unit = self._unit
        assert isinstance(unit, FSDPModule)
        event: torch.cuda.Event | None = self._optimizer.first_updated  # type: ignore[attr-defined]
        if event is None:  # a CPU's
            unit.unshard(async_op=True)
            return
        # FSDP2's own stream, so that buffers come out of the pool that gathers use anyway.
        stream = unit._get_fsdp_state()._comm_ctx.all_gather_copy_in_stream
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            unit.unshard(async_op=True)

    @property
    def _shard(self) -> Tensor:
        return local_part(self._unit.weight)
