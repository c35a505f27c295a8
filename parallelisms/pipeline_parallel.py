"""Pipeline parallelism: a model cut into stages, and micro-batches that flow through them.

    forward    stage 0 -> hidden states (B, S/tp, D) -> stage 1 -> ... -> last stage -> logits -> loss
    backward   stage 0 <- their gradients            <- stage 1 <- ... <- last stage

Stages and schedules are those of torch.distributed.pipelining; what each rank holds comes from
`parallelisms.pipeline_stages`. Three things are done here:

- `cut` makes the parts of a rank from the whole model, and `merged` shows them as one module whose FQNs are
  the whole model's: optimizer, converters and checkpoints need not know that there are stages;
- `Pipeline.forward_backward` runs a schedule over the micro-batches of a local batch. Shapes are declared,
  not found out by a trial run, which would be a forward pass that training does not know of;
- `Pipeline.evaluate` runs forward only, of any batch size: stage by stage, each passing its micro-batches on.

The loss is on the ranks of the last stage alone and 0 elsewhere: a sum over the ``pp`` axis gives it to all.

FSDP2 and a schedule: gradients stay whole on the stage until its last micro-batch, and are then
reduce-scattered once; with accumulation over several local batches, after the last of these.

Legend: B sequences of a micro-batch, S positions, D model width, V vocabulary, p ranks of the ``pp`` axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from parallelisms.config import ParallelismConfig
from parallelisms.pipeline_schedules import FROM_FILE, SCHEDULES, splits_backward
from parallelisms.pipeline_stages import StageLayout

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Activations:
    """What travels between stages, and what the last one gives."""

    width: int
    """D."""
    vocabulary: int
    """V."""
    dtype: torch.dtype
    sequence_parts: int
    """Parts that tensor parallelism cuts the positions into, between blocks."""
    ends_with_loss: bool = False
    """The last stage takes labels and gives the loss itself."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """An example of hidden states for (B, S) tokens, on ``meta``."""
        B, S = tokens.shape
        shape = (B, S // self.sequence_parts, self.width)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)

    def last(self, tokens: Tensor) -> Tensor:
        """An example of logits (or the loss), on ``meta``; a DTensor of shards has this shape too."""
        if self.ends_with_loss:
            return torch.empty((), device="meta", requires_grad=True)
        shape = (*tokens.shape, self.vocabulary)
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)


def cut(model: nn.Module, blocks: str, layout: StageLayout, rank: int) -> list[nn.Module]:
    """The parts of `model` that `rank` of the ``pp`` axis holds, ascending; `model` is used up.

    Args:
        model: The whole, on ``meta``: converted, not yet wrapped by anything.
        blocks: FQN of its block list.
        layout: What each stage holds.
        rank: Place on the ``pp`` axis.
    """
    outside = {name for names in layout.fqns for name in names if not name.startswith(f"{blocks}.")}
    mine = layout.of_rank(rank)
    parts = []
    for stage in mine:
        part = model if stage == mine[-1] else copy.deepcopy(model)
        kept = set(layout.fqns[stage])
        for name in outside - kept:
            setattr(part, name, None)
        listed: Any = part.get_submodule(blocks)
        for name in [name for name, _ in listed.named_children() if f"{blocks}.{name}" not in kept]:
            del listed[name]
        parts.append(part)
    return parts


def merged(parts: Sequence[nn.Module], blocks: str) -> nn.Module:
    """One module with all that `parts` hold, under the FQNs of the whole model; it is not meant to run."""
    if len(parts) == 1:
        return parts[0]
    whole = nn.Module()
    whole.add_module(blocks, nn.ModuleDict())
    for part in parts:
        assert not dict(part.named_parameters(recurse=False)), "a model's parameters lie in its modules"
        for name, child in part.named_children():
            if name == blocks:
                whole.get_submodule(blocks).update(dict(child.named_children()))  # type: ignore[operator]
            else:
                whole.add_module(name, child)
    return whole


class Pipeline:
    """The stages of this rank, and the schedule that runs them together with the other ranks'."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        layout: StageLayout,
        group: dist.ProcessGroup,
        config: ParallelismConfig,
        activations: Activations,
        loss_fn: LossFn,
    ):
        self.parts = dict(zip(layout.of_rank(group.rank()), parts, strict=True))
        self.layout, self.group, self.config = layout, group, config
        self.activations, self.loss_fn = activations, loss_fn
        self._divisor: Tensor | None = None
        self._stages: list[_Stage] = []
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti | None = None

    def forward_backward(
        self,
        tokens: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
        divisor: Tensor,
        *,
        reduce_gradients: bool,
    ) -> Tensor:
        """Run one local batch through the schedule; gradients are added.

        Args:
            tokens: (local batch, S) int64, the same on all ranks of the pipeline.
            labels: As tokens; the last stage reads them.
            extra: Further arguments that every stage's forward takes by name, one row a sequence.
            divisor: The loss of each micro-batch is divided by this: the step's valid tokens.
            reduce_gradients: This is the step's last local batch, so sum gradients over data-parallel ranks.

        Returns:
            The batch's share of the step's loss, detached; 0 on ranks without the last stage.
        """
        if self._schedule is None:
            self._schedule = self._build(tokens)
        self._divisor = divisor
        for stage in self._stages:
            stage.reduce_gradients = reduce_gradients
        losses: list[Tensor] = []
        args = (tokens,) if 0 in self.parts else ()
        target = labels if self.layout.count - 1 in self.parts else None
        self._schedule.step(*args, target=target, losses=losses, return_outputs=False, **extra)
        if not losses:
            return torch.zeros((), device=tokens.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Sum of `loss_fn` over the batch, forward only; 0 on ranks without the last stage.

        Stages s .. s + p - 1 overlap as in GPipe. What crosses from one such row to the next (in a loop,
        from the last rank to the first) is received as a whole before the row begins, so that two ranks
        which send to each other always agree on the order.
        """
        size, p = self.config.pipeline_parallel_microbatch_size, self.group.size()
        chunks = [
            dict(zip(extra, row, strict=True))
            for row in zip(*(v.split(size) for v in extra.values()), strict=True)
        ]
        inputs, targets = list(tokens.split(size)), labels.split(size)
        total = torch.zeros((), device=tokens.device)
        local: list[Tensor] = []
        sends: list[dist.Work] = []
        for stage, part in self.parts.items():
            before, after = self._rank_of(stage - 1), self._rank_of(stage + 1)
            received: Iterator[Tensor] = iter(local or inputs)
            if before not in (None, self.group.rank()):
                received = (self._receive(chunk, before) for chunk in inputs)
                if stage % p == 0:
                    received = iter(list(received))
            local, held = [], []
            for index, hidden in enumerate(received):
                out = part(hidden, **(chunks[index] if chunks else {}))
                if after is None:
                    total += self.loss_fn(out, targets[index])
                elif after == self.group.rank():
                    local.append(out)
                elif (stage + 1) % p == 0:
                    held.append(out)
                else:
                    sends.append(self._send(out, after))
            sends += [self._send(out, after) for out in held]
        for send in sends:
            send.wait()
        for part in self.parts.values():
            _reshard(part)
        return total

    def _build(self, tokens: Tensor) -> PipelineScheduleSingle | PipelineScheduleMulti:
        size = self.config.pipeline_parallel_microbatch_size
        chunk = tokens[:size].to("meta")
        hidden, last = self.activations.hidden(chunk), self.layout.count - 1
        for index, part in self.parts.items():
            if isinstance(part, FSDPModule):
                # A schedule may gather a unit before any forward, and FSDP must know the root by then.
                fully_shard.state(part)._lazy_init()  # type: ignore[attr-defined]
            self._stages.append(
                _Stage(
                    part,
                    index,
                    self.layout.count,
                    tokens.device,
                    input_args=(chunk if index == 0 else hidden,),
                    output_args=(self.activations.last(chunk) if index == last else hidden,),
                    group=self.group,
                )
            )
        if splits_backward(self.config):
            # A compiled loss must keep its buffers for the second half of backward.
            torch._functorch.config.donated_buffer = False
        name, microbatches = self.config.pipeline_parallel_schedule, len(tokens) // size
        options: dict[str, Any] = {"loss_fn": self._divided_loss, "scale_grads": False}
        if name == FROM_FILE:
            schedule = _PipelineScheduleRuntime(self._stages, microbatches, **options)
            schedule._load_csv(self.config.pipeline_parallel_schedule_csv)
            return schedule
        held = self._stages if SCHEDULES[name].several_stages else self._stages[0]
        return get_schedule_class(name)(held, microbatches, **options)

    def _divided_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self._divisor is not None
        return self.loss_fn(logits, labels) / self._divisor

    def _rank_of(self, stage: int) -> int | None:
        return self.layout.ranks[stage] if 0 <= stage < self.layout.count else None

    def _receive(self, tokens: Tensor, source: int | None) -> Tensor:
        hidden = torch.empty_like(self.activations.hidden(tokens), device=tokens.device, requires_grad=False)
        dist.recv(hidden, group=self.group, group_src=source)
        return hidden

    def _send(self, hidden: Tensor, target: int | None) -> dist.Work:
        work = dist.isend(hidden.contiguous(), group=self.group, group_dst=target)
        assert work is not None
        return work


class _Stage(PipelineStage):
    """A stage that sums its gradients over data-parallel ranks only when told to."""

    reduce_gradients = True

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Called by the schedule after the stage's last micro-batch."""
        if self.reduce_gradients:
            super().perform_reduce_grad(grad_scale_factor)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # Until torch 2.12 stages greet their neighbours, and gloo cannot send to its own rank (a V's turn).
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor | None:
        """The ranks' vote whether shapes are declared (torch 2.13), which a dry run cannot read: they are."""
        result = super()._warmup_backward_result(received_result)
        return torch.tensor(1) if isinstance(result, FakeTensor) else result

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The weights' half of a backward, after which FSDP's hooks do not run."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        # As they would: micro-batches are added in the reduction's dtype, not in the bf16 of the weights.
        for fsdp_param in _fsdp_parameters(self.submod):
            fsdp_param.accumulate_unsharded_grad_if_needed()
            fsdp_param.to_accumulated_grad_if_needed()


def _fsdp_parameters(part: nn.Module) -> Iterator[Any]:
    if isinstance(part, FSDPModule):
        for state in fully_shard.state(part)._state_ctx.all_states:  # type: ignore[attr-defined]
            # Until torch 2.12 a state had one group or none.
            for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]):
                yield from group.fsdp_params if group is not None else ()


def _reshard(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
