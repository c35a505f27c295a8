"""Sizes that follow from a checked configuration: the model's, the mesh's, the batch's. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from models import MODELS


@dataclass(frozen=True)
class BatchArithmetic:
    """How sequences per step come about."""

    local_batch_size: int
    """Sequences per data-parallel rank and micro-batch."""
    dp_degree: int
    """Ranks that see different data: replicas times shards."""
    gradient_accumulation_steps: int
    seq_len: int

    @property
    def global_batch_size(self) -> int:
        """Sequences per step."""
        return self.local_batch_size * self.dp_degree * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step over all ranks."""
        return self.global_batch_size * self.seq_len


def model_config(config: Any) -> Any:
    """The chosen flavor with its overrides, and RoPE tables as long as the longest sequence.

    Raises:
        KeyError: the model or flavor does not exist (`name_problems` says so in words).
    """
    flavor = MODELS[config.model.name].flavors[config.model.flavor]
    longest = config.training.seq_len
    if config.validation.enable:
        longest = max(longest, config.validation.seq_len)
    values = {"max_seq_len": longest, **config.model.overrides}
    return replace(flavor, **values)


def dp_shard_degree(config: Any, world_size: int) -> int:
    """The sharding degree with -1 filled in; 0 where the degrees do not fit `world_size`."""
    p = config.parallelism
    others = (
        p.data_parallel_replicate_degree
        * p.tensor_parallel_degree
        * p.context_parallel_degree
        * p.pipeline_parallel_degree
    )
    if p.data_parallel_shard_degree == -1:
        return world_size // others if world_size % others == 0 else 0
    return p.data_parallel_shard_degree if others * p.data_parallel_shard_degree == world_size else 0


def batch_arithmetic(config: Any, world_size: int) -> BatchArithmetic:
    """Batch sizes of a checked configuration."""
    dp = config.parallelism.data_parallel_replicate_degree * dp_shard_degree(config, world_size)
    micro = config.training.local_batch_size * dp
    total = config.training.global_batch_size
    accumulation = 1 if total == -1 else total // micro
    return BatchArithmetic(config.training.local_batch_size, dp, accumulation, config.training.seq_len)
