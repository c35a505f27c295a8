"""Output and loss of a few tokens at a time, so that the logits of a micro-batch never exist whole.

With hidden states X (T, D), the output's weight W (V, D), and T cut into chunks c:

    forward    for each c:  Z = X[c] Wᵀ,  loss += CE(Z, labels[c]),  dZ;  dX[c] = dZ W,  dW += dZᵀ X[c]
    backward   dX * g,  dW * g            with g the gradient of the loss, which stays on the device

So the three GEMMs run in forward, on one chunk's logits, and nothing is computed twice. What it costs: dW of
several chunks is added in fp32 (each rounded to the compute dtype by its GEMM, so the sum is about as exact
as one GEMM's), which moves 10 bytes an element of a bf16 W for every chunk after the first and 12 for all
together; and the sum and one chunk's dW, 6 bytes an element of W, are there beside a chunk's logits. It
therefore pays where a micro-batch has several times D tokens; below that, the fused loss
(`kernels.cross_entropy`) over whole logits takes as little memory and no such time. `octavo plan` counts
both.

The output module itself makes the logits of every chunk, so a converted one (float8) or a split one (tensor
parallelism, whose logits are shards of the vocabulary) acts as it always does: `apply_chunked_loss` comes
after those and before FSDP. Its hooks so far (tensor parallelism's) then run for each chunk, and those added
later (FSDP's) once around all: weights are gathered once and their gradient reduced once.

Legend: B sequences, S positions, T = B S tokens of a micro-batch, D model width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config.errors import ConfigError, Problem
from trainer.loss import LossFn

_ROWS = 16
"""Chunks are multiples of it, as float8 GEMMs want their sizes."""


def apply_chunked_loss(model: nn.Module, roles: Mapping[str, str], chunk_tokens: int, loss_fn: LossFn) -> str:
    """Make `model`, called with ``labels=``, return the sum of its losses; without, logits as before.

    Args:
        model: The whole or a stage; converted and split, not yet sharded by FSDP.
        roles: FQN pattern -> role.
        chunk_tokens: Tokens of a chunk, about; 0 leaves the model as it is.
        loss_fn: (logits, labels) -> sum over all valid positions.

    Returns:
        What was done, for the start-up log; empty where nothing was.

    Raises:
        ConfigError: the model's forward takes no labels.
    """
    found = [getattr(model, fqn, None) for fqn, role in roles.items() if role == "output"]
    output = next((module for module in found if module is not None), None)
    if not chunk_tokens or output is None:
        return ""
    if "labels" not in inspect.signature(model.forward).parameters:
        message = f"{type(model).__name__}.forward takes no labels (models/spec.py), so this must stay 0"
        raise ConfigError([Problem("training.loss_chunk_tokens", message)])
    output.forward = _OutputAndLoss(output, chunk_tokens, loss_fn).forward
    return f"loss: output and cross-entropy of {chunk_tokens} tokens at a time, gradients in forward"


def loss_of_model(loss: Tensor, labels: Tensor) -> Tensor:
    """The loss function of a model that has computed its loss."""
    return loss


class _OutputAndLoss:
    """The output module's new forward. Takes over the hooks that the module has by now."""

    def __init__(self, output: nn.Module, chunk_tokens: int, loss_fn: LossFn):
        self.output, self.compute = output, output.forward
        self.chunk_tokens, self.loss_fn = chunk_tokens, loss_fn
        self.before, output._forward_pre_hooks = output._forward_pre_hooks, OrderedDict()
        self.after, output._forward_hooks = output._forward_hooks, OrderedDict()
        assert not output._forward_pre_hooks_with_kwargs, "no hook is expected that wants keywords"
        assert not output._forward_hooks_with_kwargs, "no hook is expected that wants keywords"

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Sum of the losses; logits where no labels are given.

        Args:
            hidden: (B, S, D), or this rank's positions (B, S/tp, D).
            labels: (B, S), whole on every rank.
        """
        if labels is None:
            return self.logits(hidden)
        if isinstance(hidden, DTensor):
            hidden = hidden.to_local()
        chunks = _Chunks(hidden.shape[:2], labels, self.chunk_tokens)
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        if not torch.is_grad_enabled():
            return torch.stack([self._loss(flat[:, own], of_own) for own, of_own in chunks]).sum()
        weights = [p for p in self.output.parameters() if p.requires_grad]
        loss, d_hidden, d_weights = _loss_and_gradients(flat.detach(), chunks, self._loss, weights)
        # Two nodes, so that a pipeline which splits backward gets each half when it asks for it.
        of_weights = _Given.apply(torch.zeros_like(loss), d_weights, *weights)
        return _Given.apply(loss, [d_hidden], flat) + of_weights

    def logits(self, hidden: Tensor) -> Tensor:
        """What the module's call would have given."""
        args: Any = (hidden,)
        for hook in self.before.values():
            given = hook(self.output, args)
            if given is not None:
                args = given if isinstance(given, tuple) else (given,)
        result = self.compute(*args)
        for hook in self.after.values():
            given = hook(self.output, args, result)
            result = result if given is None else given
        return result

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fn(self.logits(hidden), labels)


class _Chunks:
    """Which tokens are computed together, and their labels.

    Under tensor parallelism every rank of the group has other positions, S/tp each, and the output gathers
    what it is given: a chunk is the same part of every rank's tokens, and its labels are theirs, in rank
    order.
    """

    def __init__(self, local: torch.Size, labels: Tensor, chunk_tokens: int):
        B, S_local = local
        self.tokens, parts = B * S_local, labels.shape[1] // S_local
        self.labels = labels.reshape(B, parts, S_local).transpose(0, 1).reshape(parts, self.tokens)
        count = -(-self.tokens * parts // chunk_tokens)
        even = -(-self.tokens // count)
        self.size = -(-even // _ROWS) * _ROWS

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(this rank's tokens, labels (1, T_chunk) of what the group then has)."""
        for first in range(0, self.tokens, self.size):
            own = slice(first, min(first + self.size, self.tokens))
            yield own, self.labels[:, own].reshape(1, -1)

    def __len__(self) -> int:
        return len(range(0, self.tokens, self.size))


def _loss_and_gradients(
    hidden: Tensor, chunks: _Chunks, loss_of: LossFn, weights: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sum of the losses of (1, T, D) hidden states, and its gradients: of them, and of the weights."""
    losses: list[Tensor] = []
    d_hidden = torch.empty_like(hidden)
    sums: list[Tensor] = []
    for own, labels in chunks:
        x = hidden[:, own].detach().requires_grad_()
        loss = loss_of(x, labels)
        losses.append(loss.detach())
        dx, *d_weights = torch.autograd.grad(loss, (x, *weights))
        d_hidden[:, own] = dx
        sums = _added(sums, d_weights, len(chunks))
        del loss, d_weights  # before the next chunk's logits are made
    return torch.stack(losses).sum(), d_hidden, sums


class _Given(torch.autograd.Function):
    """A value with gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.dtypes = [t.dtype for t in inputs]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the value, which nobody has to wait for."""
        scaled = [_times(d, grads[0], dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (None, None, *scaled)


def _added(sums: list[Tensor], terms: list[Tensor], count: int) -> list[Tensor]:
    """The sums so far of `count` terms with the next ones. In fp32: bf16 would round at every chunk."""
    if not sums:
        return [term.float() for term in terms] if count > 1 else terms
    return [total.add_(term) for total, term in zip(sums, terms, strict=True)]


def _times(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``t * factor`` in `dtype`, rounded once and in one pass over memory."""
    if isinstance(t, DTensor):
        local = _times(t.to_local(), factor, dtype)
        return DTensor.from_local(
            local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
        )
    return torch.mul(t, factor, out=torch.empty_like(t, dtype=dtype))
