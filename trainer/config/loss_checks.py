"""Warnings about how the loss is computed. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.load import Loaded


def loss_warnings(loaded: Loaded) -> Iterator[str]:
    """Settings of the loss that change nothing in this run, each with the reason."""
    c = loaded.config
    fused = c.training.loss_kernel == "fused"
    if c.compile.enable and c.compile.components == ["loss"] and fused:
        yield "compile.components 'loss' has no effect: training.loss_kernel is 'fused', never compiled"
    chunk, p = c.training.loss_chunk_tokens, c.parallelism
    pipelined = p.pipeline_parallel_degree > 1
    rows = p.pipeline_parallel_microbatch_size if pipelined else c.training.local_batch_size
    tokens = rows * (c.training.seq_len // p.context_parallel_degree)
    if chunk >= tokens:
        yield f"training.loss_chunk_tokens {chunk} cuts nothing: a micro-batch of a rank has {tokens} tokens"
