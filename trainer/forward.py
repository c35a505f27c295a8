"""One batch through the model, forward and backward: plain, or through the stages of a pipeline.

    batch -> on the device -> runner.forward_backward -> the batch's share of the step's loss, gradients added

Every share is a sum of cross-entropies over the valid tokens of the whole step (`trainer.loss`), so shares
of micro-batches, ranks and stages are simply added. Under pipeline parallelism the loss is on the ranks of
the last stage and 0 elsewhere, and under context parallelism each rank has that of its positions;
`Forward.sum_of_parts` gives the whole to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallelisms.context_parallel import SequenceShards
from parallelisms.fsdp import set_replica_all_reduce
from parallelisms.mesh import Mesh
from parallelisms.pipeline_parallel import Pipeline
from trainer.build import BuiltModel
from trainer.config.job import JobConfig
from trainer.data.batches import Batch

LossFn = Callable[[Tensor, Tensor], Tensor]


class Runner(Protocol):
    """How a batch on the device is run; see `Pipeline`, whose methods these are."""

    def forward_backward(
        self,
        tokens: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
        divisor: Tensor,
        *,
        reduce_gradients: bool,
    ) -> Tensor:
        """The batch's share of the step's loss, detached; gradients are added."""

    def evaluate(self, tokens: Tensor, labels: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Sum of the loss over the batch, forward only."""


class WholeModel:
    """Runs a model that every rank holds from end to end (or its shards)."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        self.model, self.loss_fn = model, loss_fn

    def forward_backward(
        self,
        tokens: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor],
        divisor: Tensor,
        *,
        reduce_gradients: bool,
    ) -> Tensor:
        """See `Runner`."""
        set_replica_all_reduce(self.model, reduce_gradients)
        logits = self.model(tokens, **extra)
        loss = self.loss_fn(logits, labels) / divisor
        del logits  # freed before backward allocates its own
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """See `Runner`."""
        return self.loss_fn(self.model(tokens, **extra), labels)


class Forward:
    """What the trainer calls for every batch."""

    def __init__(
        self, config: JobConfig, built: BuiltModel, mesh: Mesh, device: torch.device, loss_fn: LossFn
    ):
        self._device = device
        self._wants_documents = built.wants_documents
        self._stages = mesh.device_mesh.get_group("pp") if mesh.degrees["pp"] > 1 else None
        cp_mesh = mesh.device_mesh["cp"]
        self._sequences = SequenceShards(built.parts, cp_mesh, config.parallelism)
        shared_by = [self._stages, cp_mesh.get_group() if cp_mesh.size() > 1 else None]
        self._sharing = [group for group in shared_by if group is not None]
        self._runner: Runner = WholeModel(built.model, loss_fn)
        if self._stages is not None:
            assert built.stages is not None
            self._runner = Pipeline(
                built.parts, built.stages, self._stages, config.parallelism, built.activations, loss_fn
            )

    def forward_backward(self, batch: Batch, valid: Tensor, *, last: bool) -> Tensor:
        """This batch's share of the step's loss (a scalar, detached); gradients are added.

        Args:
            batch: On the host.
            valid: Labels of the whole step that count, over all ranks and batches.
            last: The step's last batch: gradients are then summed over replicas.
        """
        return self._runner.forward_backward(*self._on_device(batch), valid, reduce_gradients=last)

    def evaluate(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of a batch, forward only."""
        return self._runner.evaluate(*self._on_device(batch))

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """Losses summed over the ranks that share a batch: stages and parts of sequences; in place."""
        for group in self._sharing:
            dist.all_reduce(values, group=group)
        return values

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = batch.tokens.to(self._device, non_blocking=True)
        labels = batch.labels.to(self._device, non_blocking=True)
        tokens, labels = self._sequences.shard(tokens, labels)
        if not self._wants_documents:
            return tokens, labels, {}
        return tokens, labels, {"document_ids": batch.document_ids.to(self._device, non_blocking=True)}
