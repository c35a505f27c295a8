"""Checks of how FSDP2 gathers weights and reduces gradients. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.errors import Problem
from trainer.config.load import Loaded

_REDUCE = "parallelism.fsdp_reduce_scatter"
_SINGLE = "parallelism.fsdp_single_shard"
_TRANSPORT = "parallelism.fsdp_transport"


def fsdp_problems(loaded: Loaded) -> Iterator[Problem]:
    """What contradicts itself whatever the number of processes."""
    c, p = loaded.config, loaded.config.parallelism
    if p.fsdp_reduce_scatter == "bfloat16_wire":
        if c.training.mixed_precision_param == "float32":
            message = "'bfloat16_wire' needs bf16 gradients, and training.mixed_precision_param is float32"
            yield loaded.problem(_REDUCE, message)
        if p.pipeline_parallel_degree > 1:
            message = (
                "'bfloat16_wire' would sum a pipeline's micro-batches in bf16; allowed: torch, compute_pool"
            )
            yield loaded.problem(_REDUCE, message)
    if p.fsdp_transport == "copy_engine":
        yield from _transport_problems(loaded)
    if p.fsdp_single_shard != "direct":
        return
    float8 = c.quantize.linear.float8
    refused = {
        "needs training.mixed_precision_param 'bfloat16': in float32 the copy would be the weights again": (
            c.training.mixed_precision_param != "bfloat16"
        ),
        "needs training.dtype 'float32': bf16 weights need no copy in bf16": c.training.dtype != "float32",
        "keeps weights on the device, training.enable_cpu_offload does not": c.training.enable_cpu_offload,
        "keeps weights, parallelism.fsdp_reshard_after_forward 'always' frees them": (
            p.fsdp_reshard_after_forward == "always"
        ),
        "reduces no gradients, so parallelism.fsdp_reduce_scatter would have no effect": (
            p.fsdp_reduce_scatter not in ("auto", "torch")
        ),
        "keeps whole float8 weights, so float8.keep_float8_shards would have no effect": (
            "float8" in c.model.converters and float8.keep_float8_shards is True
        ),
    }
    yield from (loaded.problem(_SINGLE, f"'direct' {reason}") for reason, true in refused.items() if true)


def _transport_problems(loaded: Loaded) -> Iterator[Problem]:
    c, p = loaded.config, loaded.config.parallelism
    refused = {
        "sends gradients in bf16, and training.mixed_precision_param is float32": (
            c.training.mixed_precision_param == "float32"
        ),
        "would sum a pipeline's micro-batches in bf16; allowed: nccl": p.pipeline_parallel_degree > 1,
        "copies between GPUs, training.enable_cpu_offload keeps weights on the host": (
            c.training.enable_cpu_offload
        ),
        f"needs {_REDUCE} 'bfloat16_wire', got {p.fsdp_reduce_scatter!r}": (
            p.fsdp_reduce_scatter not in ("auto", "bfloat16_wire")
        ),
    }
    for reason, true in refused.items():
        if true:
            yield loaded.problem(_TRANSPORT, f"'copy_engine' {reason}")


def single_shard_problems(loaded: Loaded, world_size: int, accumulation_steps: int) -> Iterator[Problem]:
    """Where ``fsdp_single_shard = "direct"`` has more than one device or micro-batch."""
    if loaded.config.parallelism.fsdp_single_shard != "direct":
        return
    if world_size > 1:
        yield loaded.problem(_SINGLE, f"'direct' is for one device alone, there are {world_size} processes")
    if accumulation_steps > 1:
        message = f"'direct' would add {accumulation_steps} micro-batches up in bf16; allowed: copy"
        yield loaded.problem(_SINGLE, message)


def fsdp_warnings(loaded: Loaded) -> Iterator[str]:
    """Settings without effect."""
    c = loaded.config
    if c.parallelism.fsdp_reduce_scatter != "compute_pool":
        return
    if c.training.enable_cpu_offload:
        yield f"{_REDUCE} has no effect: sums are copied to the host (training.enable_cpu_offload)"
    elif c.training.dtype != "float32":
        yield f"{_REDUCE} has no effect: sums are cast to training.dtype"
