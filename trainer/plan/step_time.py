"""Expected time of a step, from the ceilings of the device table, as a range.

    fastest   GEMMs and attention at the ceilings, one pass of memory traffic for the rest, communication
              hidden behind all of it
    slowest   GEMMs at 80 % of the ceilings, unfused memory traffic, half of the communication in the open

A run that is slower than the range has something that a profile will show; one that is faster shows an
error in this file.

Legend: M positions, K and N in and out features of a linear; F FLOP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.metrics.devices import ATTENTION_SHARE, Device
from trainer.plan.activations import Recompute
from trainer.plan.communication import Traffic
from trainer.plan.layout import Layout, Stage
from trainer.plan.shapes import LinearShape, ModelShape

_CAST_BYTES = 16
"""Of a float8 linear's casts: about 10 X + 6 Y, as compiled; per element of the mean of X and Y."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest pipeline rank."""

    fastest_seconds: float
    slowest_seconds: float
    gemm_seconds: float
    attention_seconds: float
    recompute_seconds: float
    memory_seconds: float
    """Norms, activations, casts and residuals."""
    optimizer_seconds: float
    communication_seconds: float
    bubble: float
    """Share of the step that a pipeline rank waits at its ends."""


def plan_time(
    config: Any,
    model: ModelShape,
    layout: Layout,
    stage: Stage,
    recompute: Recompute,
    traffic: list[Traffic],
    device: Device,
) -> StepTime | None:
    """The range for one pipeline rank; None for a device without known ceilings."""
    if device.gemm_bf16_tflops is None or device.copy_tb_per_second is None:
        return None
    copy = device.copy_tb_per_second * 1e12
    rounds = layout.rounds
    forward = _block_gemms(model, layout, device)
    attention = _attention(model, layout, device)
    head = _head(model, layout, device) if stage.last else 0.0
    layers = len(stage.layers)
    gemm = rounds * (3 * forward * layers + 3 * head)
    attend = rounds * layers * sum(attention)
    redone = rounds * sum(recompute_seconds(model, layout, recompute, i, device) for i in stage.layers)
    memory = rounds * layers * _block_traffic(model, layout) / copy
    shards = sum(p.shard_numel for p in model.block) * layers + sum(
        p.shard_numel
        for p in (*(model.embedding if stage.first else ()), *(model.head if stage.last else ()))
    )
    optimizer = _optimizer_bytes(config) * shards / copy
    sent = sum(_seconds(item, device) for item in traffic)
    compute = gemm + attend + redone + memory + optimizer
    pp = layout.degrees["pp"]
    bubble = (pp - 1) / (layout.stage_microbatches + pp - 1)
    slow = (gemm + attend + redone) / 0.8 + 2 * memory + 4 * optimizer + sent / 2
    return StepTime(
        max(compute, sent) / (1 - bubble),
        max(slow, sent) / (1 - bubble),
        gemm,
        attend,
        redone,
        memory,
        optimizer,
        sent,
        bubble,
    )


def recompute_seconds(
    model: ModelShape, layout: Layout, recompute: Recompute, layer: int, device: Device
) -> float:
    """What one block's backward computes again, of one forward."""
    mode = recompute.of_layer(layer)
    copy = (device.copy_tb_per_second or 1.0) * 1e12
    pointwise = _block_traffic(model, layout) / 3 / copy
    if mode == "none":
        return 0.0
    whole = _block_gemms(model, layout, device) + _attention(model, layout, device)[0] + pointwise
    if mode == "full":
        return whole
    if mode == "memory_budget":
        return (1 - recompute.budget) * whole
    again = model.sizes.recomputed_per_op()
    redone = (_gemm(linear, layout, device) for linear in model.sizes.linears if linear.name in again)
    return sum(redone) + pointwise


def _rate(linear: LinearShape, device: Device) -> float:
    rate = device.gemm_float8_tflops if linear.float8 else None
    return (rate or device.gemm_bf16_tflops or 1.0) * 1e12


def _gemm(linear: LinearShape, layout: Layout, device: Device) -> float:
    return 2 * layout.tokens * linear.k * linear.n / _rate(linear, device)


def _block_gemms(model: ModelShape, layout: Layout, device: Device) -> float:
    """Forward of one block's linears."""
    return sum(
        _gemm(linear, layout, device)
        for part in model.sizes.parts
        for linear in (*part.columnwise, *part.rowwise)
    )


def _head(model: ModelShape, layout: Layout, device: Device) -> float:
    rate = (device.gemm_bf16_tflops or 1.0) * 1e12
    return 2 * layout.tokens * model.sizes.width * model.vocabulary / layout.tp / rate


def _attention(model: ModelShape, layout: Layout, device: Device) -> tuple[float, float]:
    """(forward, backward) of one block: causal, so half of the scores; backward does 2.5 times the work."""
    width = model.sizes.heads * model.flop_inputs.head_dim
    flop = 2 * layout.tokens * layout.batch.seq_len * width
    peak = (device.peak_bf16_tflops or 1.0) * 1e12
    return flop / (peak * ATTENTION_SHARE[0]), 2.5 * flop / (peak * ATTENTION_SHARE[1])


def _block_traffic(model: ModelShape, layout: Layout) -> float:
    """Bytes that norms, RoPE, the gate, residuals and casts of one block move, forward and backward."""
    sizes = model.sizes
    stream = 2 * sizes.width / layout.tp
    total = 24 * stream
    for part in sizes.parts:
        wide = sum(linear.n for linear in part.columnwise)
        total += (4 if part.is_attention else 5) * 2 * wide
        for linear in (*part.columnwise, *part.rowwise):
            total += _CAST_BYTES * (linear.k + linear.n) / 2 * linear.float8
    return total * layout.tokens


def _optimizer_bytes(config: Any) -> int:
    """Of one parameter, from reduced gradient to new value; `foreach` and `for-loop` take several times that.

    docs/optimizer.md has the passes over fp32; `parallelisms.direct_weights` those over its bf16 gradients
    and copies, which the one-pass step reads and writes itself.
    """
    master = 2 if config.training.dtype == "bfloat16" else 4
    one_pass = config.optimizer.implementation == "one_pass"
    direct = config.parallelism.fsdp_single_shard == "direct"
    gradient = 2 if one_pass and direct else master
    # The norm reads them; where they are scaled in a pass of its own, that reads and writes them.
    norm = (1 if one_pass else 3) * gradient if config.training.max_norm else 0
    step = gradient + 6 * master  # parameter and two moments, read and written
    return norm + step + (2 if one_pass else 6 + 6) * direct


def _seconds(item: Traffic, device: Device) -> float:
    rate = (
        device.host_collective_gb_per_second if item.within_host else device.network_collective_gb_per_second
    )
    return item.bytes / ((rate or 1.0) * 1e9)
