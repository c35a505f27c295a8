"""The [optimizer] and [lr_scheduler] sections. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Adam, with decoupled (AdamW) or L2 (Adam) weight decay."""
    lr: float = field(default=8e-4, metadata={"above": 0.0})
    """Peak learning rate."""
    beta1: float = field(default=0.9, metadata={"min": 0.0, "below": 1.0})
    """Decay of the gradient's running mean."""
    beta2: float = field(default=0.95, metadata={"min": 0.0, "below": 1.0})
    """Decay of the squared gradient's running mean."""
    eps: float = field(default=1e-8, metadata={"above": 0.0})
    """Added to the denominator of the update."""
    weight_decay: float = field(default=0.1, metadata={"min": 0.0})
    """Decay of matrices (two and more dims, the embedding included); norms and biases are never decayed."""
    implementation: Literal["fused", "foreach", "for-loop", "one_pass"] = "fused"
    """torch's kernel for all parameters, one for each operation, or a loop; or Octavo's, which also clips."""
    early_step_in_backward: bool = False
    """Step each parameter inside backward to free its gradient early; excludes clipping and accumulation."""


@dataclass(frozen=True)
class LRSchedulerConfig:
    """Warm-up, stable, decay: the learning rate as a factor of `optimizer.lr`."""

    warmup_steps: int = field(default=200, metadata={"min": 0})
    """Linear warm-up; longer than the run is cut to its length with a warning."""
    total_steps: int | None = field(default=None, metadata={"min": 1})
    """Length of the schedule where it differs from training.steps."""
    decay_ratio: float | None = field(default=None, metadata={"min": 0.0, "max": 1.0})
    """Fraction of the steps that decay; unset starts the decay right after warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_lr_factor: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    """Where the decay ends, as a factor of the peak."""
