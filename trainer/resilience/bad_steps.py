"""Bad steps: a loss or gradient that is NaN or infinite, or a loss far above those before it.

A bad step is skipped: parameters and the optimizer's state keep their bits. It counts as a step all the same:
its batch is consumed, the learning rate goes by the step's number, the converters' hooks run (delayed float8
scaling takes a non-finite amax for none). With N the joint gradient norm, L the step's loss, m the running
mean of good losses and f `resilience.loss_spike_factor`::

    bad = not isfinite(N)  or  (f > 0 and L > f m, once there are enough good losses)
    m <- m + (L - m) / min(k, 20) at the k-th good step

A loss that is not finite makes a norm that is not. L is summed over ranks once a step only where f > 0.

No GPU is waited for. `bad` is computed on the device and given to a fused or one-pass optimizer as
`found_inf`, which gradient scalers use: the kernel then changes nothing. (With others the host asks.) What
happened is copied to the host and read one step later, when the next step's work is queued already; on a CPU
at once. N and L are the same on every rank, so all decide alike without asking each other.

To name the module, the gradients' own norms are kept, which the joint norm is made of. A NaN spreads from
where it arises to all that backward reaches later, so the culprit is the last of the bad ones in the order of
the forward pass. Where every gradient is bad, the loss was so already: then the blocks' outputs, watched by
hooks unless blocks are compiled, say which block was first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.arrival import Arrival
from trainer.checkpoint.state import clean_fqn
from trainer.optim.clipping import GradNorms
from trainer.resilience.config import ResilienceConfig

log = logging.getLogger(__name__)

MEAN_STEPS = 20
"""Good losses that the running mean is made of, about; spikes are looked for after that many."""


class BadStepsError(RuntimeError):
    """Too many bad steps in a row: the run cannot go on by itself."""


@dataclass(frozen=True)
class _Pending:
    """A step whose outcome is on its way to the host."""

    step: int
    batch: str
    values: Arrival
    """bad, loss, norm, mean before: fp64 (4,)."""
    norms: GradNorms
    names: Sequence[str]
    """Of the parameters that had gradients."""
    outputs: Mapping[str, Tensor]
    """Block -> largest absolute output."""


class BadSteps:
    """Skips, counts and reports bad steps; see the module. All ranks make one and make the same calls.

    Args:
        config: The [resilience] section.
        group: Gloo group of all ranks, for names; None in a run of one process.
        global_loss: Sums ranks' shares of a loss, in place, so that all ranks have the whole.
    """

    def __init__(
        self,
        config: ResilienceConfig,
        group: dist.ProcessGroup | None,
        global_loss: Callable[[Tensor], Tensor],
    ) -> None:
        self._config, self._group = config, group
        self._global_loss = global_loss
        self._mean: Tensor | None = None  # (2,) fp64 on the device: running mean, good losses so far
        self._restored = (0.0, 0.0)
        self._pending: _Pending | None = None
        self._outputs: dict[str, Tensor] = {}
        self.skipped = self.in_a_row = self.roll_backs = 0
        self.roll_back_due = False

    def watch(self, blocks: Iterable[tuple[str, nn.Module]]) -> None:
        """Have eager blocks note the size of their output: one small kernel each."""
        if self._config.skip_bad_steps:
            for name, block in blocks:
                block.register_forward_hook(self._noting(name))

    def new_norms(self) -> GradNorms | None:
        """What `clip_grad_norm` is to fill for `step`."""
        return GradNorms() if self._config.skip_bad_steps else None

    def step(
        self,
        optimizer: Optimizer,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        loss: Tensor,
        norm: Tensor,
        norms: GradNorms | None,
        step: int,
        batch: str,
        grad_scale: Tensor | None = None,
    ) -> None:
        """`optimizer.step()`, unless the step is bad.

        Args:
            optimizer: Over the parameters.
            parameters: (name, parameter) of those that had a gradient, in the order of `norms`.
            loss: This rank's share of the step's loss; unchanged.
            norm: Joint gradient norm before clipping.
            norms: Of `new_norms`, filled.
            step: Its number.
            batch: Where its data is, in words.
            grad_scale: What clipping left to the optimizer, see `trainer.optim.clipping.clip_for`.
        """
        if norms is None:
            _scaled_step(optimizer, grad_scale)
            return
        self.settle()
        names = [clean_fqn(name) for name, parameter in parameters if parameter.grad is not None]
        values = self._judge(loss, norm)
        gated_step(optimizer, values[0].float(), grad_scale)
        outputs, self._outputs = self._outputs, {}
        self._pending = _Pending(step, batch, Arrival(values), norms, names, outputs)
        if values.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Look at the last step's outcome: before what depends on it, a save or the run's end.

        Raises:
            BadStepsError: on every rank, after too many in a row.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not pending.values.wait()[0]:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        text = self._describe(pending)
        log.warning("%s", text)
        if 0 < self._config.max_bad_steps <= self.in_a_row:
            self._give_up(text)

    def forget(self) -> None:
        """Drop what was noted of a forward pass that was no step."""
        self._outputs = {}

    def rolled_back(self, skipped: int) -> None:
        """The run went back to a checkpoint; what was skipped since still counts."""
        self.skipped, self._pending, self.roll_back_due, self.in_a_row = skipped, None, False, 0
        self.roll_backs += 1

    def state_dict(self) -> dict[str, Any]:
        """Counts and the running mean, as plain values; waits for the device."""
        mean, good = self._restored if self._mean is None else self._mean.tolist()
        return {"mean_loss": mean, "good_steps": good, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the counts of a checkpoint."""
        self._mean, self._restored = None, (float(state["mean_loss"]), float(state["good_steps"]))
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])

    def _judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """(bad, loss, norm, mean before) on the device, the same on every rank; renews the mean."""
        norm = norm.detach().to(loss.device).double()  # gradients may be offloaded to the host
        total = loss.detach().double()
        mean = torch.zeros_like(total)
        bad = ~norm.isfinite()
        if self._config.loss_spike_factor > 0:
            total = self._global_loss(total.clone())
            if self._mean is None:
                self._mean = torch.tensor(self._restored, dtype=torch.float64, device=loss.device)
            mean, good = self._mean.unbind()
            bad |= (good >= MEAN_STEPS) & (total > self._config.loss_spike_factor * mean)
        bad = bad.double()
        if self._mean is not None:
            count = good + 1
            moved = mean + (total - mean) / count.clamp(max=MEAN_STEPS)
            self._mean = torch.where(bad > 0, self._mean, torch.stack([moved, count]))
        return torch.stack([bad, total, norm, mean])

    def _describe(self, pending: _Pending) -> str:
        _, loss, norm, mean = pending.values.wait().tolist()
        counts = f"{self.skipped} skipped so far, {self.in_a_row} in a row"
        where = self._where(pending)
        if where is None:
            what = f"loss {loss:.4f} is {loss / mean:.1f} times the running mean {mean:.4f}"
        else:
            what = f"grad_norm {norm}: {where}"
        return f"bad step {pending.step} skipped: {what}\n  batch: {pending.batch}; {counts}"

    def _where(self, pending: _Pending) -> str | None:
        """Which gradient or block was first not to be finite on any rank; None where all are finite."""
        bad = [pending.names[place] for place in pending.norms.not_finite()]
        blocks = [name for name, size in pending.outputs.items() if not size.isfinite()]
        mine = (list(pending.names), bad, blocks)
        everyone = [mine]
        if self._group is not None:
            everyone = [mine] * dist.get_world_size(self._group)
            dist.all_gather_object(everyone, mine, group=self._group)
        order = list(dict.fromkeys(name for names, _, _ in everyone for name in names))
        bad_anywhere = {name for _, found, _ in everyone for name in found}
        block = next((found[0] for _, _, found in everyone if found), None)
        if block is not None:
            return f"the output of {block} was the first that is not finite"
        if not bad_anywhere:
            return None if pending.values.wait()[2].isfinite() else "every gradient is finite by itself"
        culprit = max(bad_anywhere, key=order.index)
        if len(bad_anywhere) == len(order):
            return f"all {len(order)} gradients are not finite, from {culprit} on: so was the loss"
        share = f"{len(bad_anywhere)} of {len(order)}"
        return f"the gradient of {culprit} was the first that is not finite ({share})"

    def _give_up(self, text: str) -> None:
        rows = f"{self.in_a_row} bad steps in a row"
        if self._config.after_bad_steps == "roll_back":
            if self.roll_backs < self._config.max_roll_backs:
                self.roll_back_due = True
                return
            rows += f" after {self.roll_backs} roll-backs"
        raise BadStepsError(f"{rows} (resilience.max_bad_steps); the last:\n  {text}")

    def _noting(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if not (module.training and isinstance(output, Tensor)):
                return
            local = output.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            size = torch.linalg.vector_norm(local, float("inf"))
            former = self._outputs.get(name)
            self._outputs[name] = size if former is None else torch.maximum(former, size)

        return note


def gated_step(optimizer: Optimizer, bad: Tensor, grad_scale: Tensor | None = None) -> None:
    """One step that changes nothing where `bad` is 1.0; `grad_scale` as for `BadSteps.step`."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # Offloaded parameters are stepped on the host, which has waited for their gradients already.
        device = optimizer.param_groups[0]["params"][0].device
        optimizer.found_inf = bad.to(device)  # type: ignore[attr-defined]
        _scaled_step(optimizer, grad_scale)
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bad:
        _scaled_step(optimizer, grad_scale)


def _scaled_step(optimizer: Optimizer, grad_scale: Tensor | None) -> None:
    if grad_scale is None:
        optimizer.step()
    else:
        optimizer.step(grad_scale=grad_scale)  # type: ignore[call-arg]
