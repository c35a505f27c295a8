"""One device alone: weights that stay gathered, gradients that stay where autograd put them.

With one shard FSDP2 has nothing to send, and still casts every weight for each gather and copies every
gradient into a buffer and out of it. What a step needs is less: a bf16 copy w of each fp32 parameter p::

    forward, backward   modules hold w; backward leaves dw in bf16
    after backward      modules hold p; p.grad is dw: the same memory, where the optimizer reads bf16,
                        else widened to fp32 (6 bytes a parameter)
    optimizer           p <- p - ...; w <- bf16(p): 6 bytes a parameter, or 2 where the optimizer writes w

Otherwise a gather casts and copies 10 bytes a parameter, twice a step unless weights stay, and a reduction
moves 6, and 8 more under `fsdp_reduce_scatter = "torch"`.

FSDP2 is there all the same: its first gather makes w, with the cast that it makes elsewhere, so the numbers
are the same to the bit. It is then told neither to free weights nor to reduce gradients, and believes that
the modules hold w; that they hold p between backward and the next forward is this file's doing, so that
whoever walks over the parameters (clipping, optimizer, checkpoint, converters) finds p. A forward without
gradients, of a validation, gives p back at its end.

Whatever else changes p has to drop w, and does: saving and loading go through `state_dict`, at which FSDP2
frees w, and its next forward gathers anew.

An optimizer that reads bf16 gradients of fp32 parameters and writes w in its own pass says so by an attribute
``low_precision_copies``, a dict of parameter -> w, which is filled before each of its steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class _Slot(NamedTuple):
    """A place in the model that holds a parameter; a tied one has two."""

    module: nn.Module
    name: str
    master: nn.Parameter
    """p, a DTensor over one shard."""


class DirectWeights:
    """Moves the parameters of a model on one device between computation and optimizer; see the module.

    Args:
        model: After `apply_fsdp` over one shard, materialised; not resharded after forward, its gradients
            reduced in the dtype of the computation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [
            _Slot(module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        """p -> w, once there was a forward."""
        self._takes_copies = False
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_backward(False, recurse=False)
                module.set_requires_gradient_sync(False, recurse=False)
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.register_forward_hook(self._after_forward)

    def attach(self, optimizer: Optimizer) -> None:
        """Have `optimizer` renew w at each of its steps, or do it after them."""
        self._takes_copies = hasattr(optimizer, "low_precision_copies")
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def hand_over_gradients(self) -> None:
        """After backward: the modules hold p, with its gradient."""
        self._hold_masters()
        for master, copy in self._copies.items():
            gradient, copy.grad = copy.grad, None
            if gradient is None:
                continue
            if self._takes_copies:
                master.grad_dtype = gradient.dtype
            else:
                gradient = gradient.to(master.dtype)
            assert master.grad is None, "gradients would have to be added up"
            master.grad = DTensor.from_local(gradient, master.device_mesh, master.placements, run_check=False)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        # Where FSDP2 freed w it gathers into the same tensor, which it registers by itself.
        for slot in self._slots:
            copy = self._copies.get(slot.master)
            if copy is not None:
                slot.module._parameters[slot.name] = copy

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            self._hold_masters()

    def _hold_masters(self) -> None:
        for slot in self._slots:
            held = slot.module._parameters[slot.name]
            if held is not slot.master:
                assert held is not None
                self._copies[slot.master] = held
                slot.module._parameters[slot.name] = slot.master

    def _gathered(self) -> dict[nn.Parameter, nn.Parameter]:
        """Those w that are in memory."""
        return {p: w for p, w in self._copies.items() if w.untyped_storage().size() > 0}

    def _before_step(self, optimizer: Optimizer, *rest: Any) -> None:
        if self._takes_copies:
            optimizer.low_precision_copies = self._gathered()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *rest: Any) -> None:
        gathered = self._gathered()
        if gathered and not self._takes_copies:
            masters: list[Tensor] = [p.to_local() for p in gathered]  # type: ignore[attr-defined]
            torch._foreach_copy_(list(gathered.values()), masters)
