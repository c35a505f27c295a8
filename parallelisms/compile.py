"""`torch.compile`, one block at a time.

All blocks of a model are alike, so the compiler works once and the result serves every layer: compile time
does not grow with depth. Each block is one full graph; a break in it is an error, not a slow surprise.

Inductor gets passes over its graphs from here, `parallelisms.graph_passes`. It compiles Triton kernels in
processes of its own, which take seconds to start: `start_compilers` does so while data and model are built,
where inductor itself would at its first graph.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from parallelisms.blocks import blocks_of
from parallelisms.config import CompileConfig


def start_compilers(config: CompileConfig, device_type: str) -> bool:
    """Start the processes that will compile Triton kernels, where there will be any; returns whether so."""
    if not (config.enable and config.backend == "inductor" and device_type == "cuda"):
        return False
    with suppress(ImportError):  # not public (torch 2.11 to 2.13); without it they start later
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()
        return True
    return False


def apply_compile(model: nn.Module, blocks: str, config: CompileConfig) -> str:
    """Compile every block in place (FQNs do not change); returns what was done, for the start-up log."""
    if not (config.enable and "model" in config.components):
        return "compile: off" if not config.enable else "compile: model left eager"
    count, options = 0, compiler_options(config.backend)
    for _, block in blocks_of(model, blocks):
        block.compile(backend=config.backend, fullgraph=True, options=options)
        count += 1
    return f"compile: {count} blocks, each one full graph, with {config.backend}"


def compiler_options(backend: str) -> dict[str, Any] | None:
    """What `torch.compile` is told, here and of linears that are timed alone; for inductor only."""
    if backend != "inductor":
        return None
    from parallelisms.graph_passes import GRAPH_PASSES

    return {"post_grad_custom_pre_pass": GRAPH_PASSES}
