"""Adam and AdamW in one pass over memory, with gradient clipping folded in (`kernels.adamw`).

They are torch's optimizers with another `step`: the same state under the same names, dtypes and devices as
``fused=True`` leaves (step, exp_avg, exp_avg_sq), so a checkpoint of one goes on in the other. What they add:

grad_scale             factor of all gradients, on the device: the clip factor
low_precision_copies   bf16 tensors that are to hold the new parameters
amaxes                 fp32 scalars that are to hold the largest magnitudes of this rank's parts of them
first                  parameters that are updated before the others; `first_updated` tells when they are

Gradients may be bf16 where parameters are fp32. `found_inf`, by which a bad step is skipped without asking
the host, works as in torch. Parameters may be DTensors: each rank updates its own part, for which nothing
travels; the part may be empty. One that is a wrapper is given to the operator as it is, so that the wrapper
sees the write (FSDPFloat8Shard forgets its scale).

Nothing is allocated but a table of addresses, where gradients are contiguous and placed as their parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from kernels.adamw import adamw_step
from parallelisms.dtensor import local_part


class _Update(NamedTuple):
    """A call of `adamw_step`."""

    is_first: bool
    arguments: tuple[Any, ...]
    steps: list[Tensor]
    """Of its parameters, counted for it already."""


class OnePass(torch.optim.Adam):
    """What `OnePassAdam` and `OnePassAdamW` share: everything but the kind of weight decay."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        # "fused" decides where torch keeps `step`, and that a gate on the device is asked.
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.low_precision_copies: dict[Tensor, Tensor] = {}
        """Parameter -> bf16 tensor of its shape, filled by each step."""
        self.amaxes: dict[Tensor, Tensor] = {}
        """Parameter -> fp32 scalar, filled by each step with the amax of this rank's part."""
        self.first: set[Tensor] = set()
        """Parameters that each step updates before all others."""
        self.first_updated: torch.cuda.Event | None = None
        """Recorded on the device when the last step had done so."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """One step.

        Args:
            closure: As for torch's optimizers.
            grad_scale: () fp32, by which every gradient counts; the gradients themselves keep their values.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        updates = [u for group in self.param_groups for u in self._updates(group, grad_scale, found_inf)]
        for is_first in (True, False):
            for update in updates:
                if update.is_first == is_first:
                    adamw_step(*update.arguments)
            if is_first and self.first and next(iter(self.first)).is_cuda:
                self.first_updated = torch.cuda.current_stream().record_event()
        if found_inf is not None:
            for update in updates:
                # A list: of one tensor torch makes a number, for which the host waits.
                factor = found_inf.to(update.steps[0].device)
                torch._foreach_sub_(update.steps, [factor] * len(update.steps))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of any of torch's Adams, also of one that kept `step` on the host."""
        groups = state_dict["param_groups"]
        if any(group.get("amsgrad") or group.get("maximize") for group in groups):
            raise ValueError("one_pass has neither amsgrad nor maximize")
        own = {"fused": True, "foreach": None, "capturable": False}
        super().load_state_dict({**state_dict, "param_groups": [{**group, **own} for group in groups]})

    def _updates(
        self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Iterator[_Update]:
        """What is to be done for `group`, one update for all that are alike; their steps are counted."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
        if not params:
            return
        torch._foreach_add_(steps, 1)
        alike: dict[tuple[bool, Hashable], list[int]] = defaultdict(list)
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            extras = param in self.low_precision_copies, param in self.amaxes
            kind = param.device, param.dtype, grad.dtype, exp_avgs[index].dtype, extras
            alike[param in self.first, kind].append(index)
        beta1, beta2 = group["betas"]
        for (is_first, _), indices in alike.items():
            chosen, chosen_steps = [params[i] for i in indices], [steps[i] for i in indices]
            device = chosen[0].device
            arguments = (
                [local_part(p) for p in chosen],
                [
                    local_part(_placed_as(p, grads[i])).contiguous()
                    for i, p in zip(indices, chosen, strict=True)
                ],
                [local_part(exp_avgs[i]) for i in indices],
                [local_part(exp_avg_sqs[i]) for i in indices],
                chosen_steps,
                [local_part(self.low_precision_copies[p]) for p in chosen if p in self.low_precision_copies],
                [self.amaxes[p] for p in chosen if p in self.amaxes],
                None if grad_scale is None else grad_scale.to(device, torch.float32),
                None if found_inf is None else found_inf.to(device, torch.float32),
                group["lr"],
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                group["decoupled_weight_decay"],
            )
            yield _Update(is_first, arguments, chosen_steps)


class OnePassAdam(OnePass):
    """torch.optim.Adam in one pass: weight decay is part of the gradient."""


class OnePassAdamW(OnePass, torch.optim.AdamW):
    """torch.optim.AdamW in one pass: weight decay acts on the parameter."""


def _placed_as(param: Tensor, grad: Tensor) -> Tensor:
    """`grad` with the placements of `param`: FSDP2 leaves it so."""
    if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad
