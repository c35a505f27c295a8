"""One device alone: weights that stay gathered, gradients that stay where autograd put them.

With one shard FSDP2 has nothing to send, and still casts every weight for each gather and copies every
gradient into a buffer and out of it. What a step needs is less: a copy w of each fp32 parameter p, in bf16::

    forward, backward   modules hold w; backward leaves dw in bf16
    after backward      modules hold p; p.grad is dw: the same memory, where the optimizer reads bf16,
                        else widened to fp32 (6 bytes a parameter)
    optimizer           p <- p - ...; w <- bf16(p): 6 bytes a parameter, or 2 where the optimizer writes w

Otherwise a gather casts and copies 10 bytes a parameter, twice a step unless weights stay, and a reduction
moves 6, and 8 more under `fsdp_reduce_scatter = "torch"`.

Two kinds of parameters have another copy or none:

- One that is gathered in float8 has its float8 form for w, half the memory, which knows how to renew itself
  from p (`RenewsItself`).
- An embedding that is not tied has none. It looks up a few thousand of its rows, which are cast then.

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

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from parallelisms.dtensor import local_part


@runtime_checkable
class RenewsItself(Protocol):
    """A gathered weight that is no plain bf16 tensor."""

    def renew(self, shard: Tensor) -> None:
        """Take over the values of the shard that it was gathered from, in place."""

    def is_gathered(self) -> bool:
        """Whether its memory is there."""


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
            reduced in the dtype of the computation. An embedding that it left alone is looked up in place.
        dtype: Of the computation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        """p -> w, once there was a forward; of an embedding p's own memory, to which autograd gives dw."""
        self._slots: list[_Slot] = []
        for module in model.modules():
            if isinstance(module, nn.Embedding) and not isinstance(module, FSDPModule):
                self._copies[module.weight] = _look_up_rows(module, dtype)
                continue
            slots = (_Slot(module, name, p) for name, p in module.named_parameters(recurse=False))
            self._slots.extend(slots)
        self._is_renewed_by_optimizer = False
        self._is_stale = False
        """Whether p has changed and some w has not."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_backward(False, recurse=False)
                module.set_requires_gradient_sync(False, recurse=False)
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.register_forward_hook(self._after_forward)

    def attach(self, optimizer: Optimizer) -> None:
        """Have `optimizer` renew w in bf16 at each of its steps; otherwise the next forward does."""
        self._is_renewed_by_optimizer = hasattr(optimizer, "low_precision_copies")
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def hand_over_gradients(self) -> None:
        """After backward: the modules hold p, with its gradient."""
        self._hold_masters()
        for master, copy in self._copies.items():
            gradient, copy.grad = copy.grad, None
            if gradient is None:
                continue
            if self._is_renewed_by_optimizer:
                master.grad_dtype = gradient.dtype
            else:
                gradient = gradient.to(master.dtype)
            assert master.grad is None, "gradients would have to be added up"
            master.grad = DTensor.from_local(gradient, master.device_mesh, master.placements, run_check=False)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        if self._is_stale:
            self._renew()
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

    def _plain_copies(self) -> dict[nn.Parameter, nn.Parameter]:
        """Those w in bf16 that are in memory."""
        return {
            slot.master: w
            for slot in self._slots
            if (w := self._copies.get(slot.master)) is not None
            and not isinstance(w, RenewsItself)
            and w.untyped_storage().size() > 0
        }

    def _before_step(self, optimizer: Optimizer, *rest: Any) -> None:
        if self._is_renewed_by_optimizer:
            optimizer.low_precision_copies = self._plain_copies()  # type: ignore[attr-defined]

    def _after_step(self, optimizer: Optimizer, *rest: Any) -> None:
        self._is_stale = True

    @torch.no_grad()
    def _renew(self) -> None:
        """Only now, since what a float8 form is made with (a scale) may be known after the step only."""
        self._is_stale = False
        for master, copy in self._copies.items():
            if isinstance(copy, RenewsItself) and copy.is_gathered():
                copy.renew(local_part(master))
        plain = {} if self._is_renewed_by_optimizer else self._plain_copies()
        if plain:
            torch._foreach_copy_(list(plain.values()), [local_part(master) for master in plain])


def _look_up_rows(module: nn.Embedding, dtype: torch.dtype) -> nn.Parameter:
    """Have an embedding read rows of its parameter itself, and cast these.

    Returns:
        The parameter's memory as a leaf, whose gradient is of `dtype`.
    """
    leaf = nn.Parameter(local_part(module.weight).detach(), requires_grad=module.weight.requires_grad)
    leaf.grad_dtype = dtype
    module.forward = lambda tokens: _Lookup.apply(tokens, leaf, dtype)  # type: ignore[method-assign]
    return leaf


class _Lookup(torch.autograd.Function):
    """Rows of a table, cast; the table's gradient is of that dtype too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., D) in `dtype` of tokens (...) and a table (V, D)."""
        ctx.save_for_backward(tokens)
        ctx.rows = table.shape[0]
        return nn.functional.embedding(tokens, table).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The table's gradient (V, D)."""
        (tokens,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grads[0], tokens, ctx.rows, -1, False), None
