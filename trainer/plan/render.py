"""A plan as text, and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from converters import ConversionReport
from trainer.metrics.flops import mfu_percent, tflops_per_device
from trainer.plan.activations import Recompute
from trainer.plan.auto import USABLE_SHARE, describe
from trainer.plan.memory import CATEGORIES, GIB, MemoryPlan
from trainer.plan.plan import Plan
from trainer.plan.shapes import Parameter
from trainer.text_table import aligned

_DIMS = {"columnwise": 0, "embedding": 0, "output": 0, "rowwise": 1}


def as_text(plan: Plan) -> str:
    """For the terminal."""
    blocks = [_head(plan), _layers(plan), _memory(plan), _choices(plan), _traffic(plan), _time(plan)]
    if plan.notes:
        blocks.append(["warnings", *(f"  {note}" for note in plan.notes)])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def as_json(plan: Plan) -> str:
    """For programs: sizes in bytes, times in seconds."""
    return json.dumps(to_dict(plan), indent=2)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    layout, batch = plan.layout, plan.layout.batch
    low, high = tps_range(plan) or (None, None)
    return {
        "model": plan.name,
        "device": {**asdict(plan.device), "usable_bytes": int(USABLE_SHARE * plan.device_bytes)},
        "world_size": layout.world_size,
        "mesh": layout.degrees,
        "parameters": plan.model.parameters,
        "flops_per_token": plan.flops_per_token,
        "batch": {
            **asdict(batch),
            "global_batch_size": batch.global_batch_size,
            "tokens_per_step": batch.tokens_per_step,
            "pipeline_microbatches": layout.stage_microbatches,
        },
        "activation_checkpoint": {"chosen": _recompute(plan.option.recompute), "automatic": plan.automatic},
        "layers": [
            {**asdict(p), "sharding": sharding(plan, p), "float8": decision(plan.model.reports, p)}
            for p in all_parameters(plan)
        ],
        "conversions": [report.to_dict() for report in plan.model.reports],
        "stages": [
            {
                "rank": stage.rank,
                "layers": list(stage.layers),
                "in_flight": stage.in_flight,
                **_memory_dict(memory),
            }
            for stage, memory in zip(plan.stages, plan.memory, strict=True)
        ],
        "fits": plan.fits,
        "options": [
            {
                **_recompute(option.recompute),
                "reserved_bytes": option.worst.reserved_bytes,
                "recompute_seconds": option.recompute_seconds,
                "fits": option.fits(plan.device_bytes),
            }
            for option in plan.options
        ],
        "checkpoint_bytes": plan.checkpoint_bytes,
        "model_bytes": plan.model_bytes,
        "communication": [asdict(item) for item in plan.traffic],
        "step_time": None if plan.time is None else asdict(plan.time),
        "tps_per_device": None if low is None else {"lowest": low, "highest": high},
        "warnings": list(plan.notes),
    }


def all_parameters(plan: Plan) -> list[Parameter]:
    """One of each distinct parameter, in model order."""
    return [*plan.model.embedding, *plan.model.block, *plan.model.head]


def sharding(plan: Plan, parameter: Parameter) -> str:
    """In words: ``rows / tp 8, rows / fsdp 64``."""
    parts = []
    dim = _DIMS.get(parameter.role)
    if plan.layout.tp > 1 and dim is not None and dim < len(parameter.shape):
        parts.append(f"{('rows', 'columns')[dim]} / tp {plan.layout.tp}")
    if plan.layout.fsdp_degree > 1:
        parts.append(f"rows / fsdp {plan.layout.fsdp_degree}")
    if plan.layout.degrees["dp_replicate"] > 1:
        parts.append(f"{plan.layout.degrees['dp_replicate']} replicas")
    return ", ".join(parts) or "whole"


def decision(reports: Sequence[ConversionReport], parameter: Parameter) -> str:
    """What the converters made of the linear that `parameter` is of, with the reason; empty for others."""
    name = parameter.fqn.rpartition(".")[0]
    for report in reports:
        for row in report.rows:
            if name in _expand(row.fqn):
                verdict = report.name if row.converted else "kept"
                return f"{verdict} ({row.reason})" if row.reason else verdict
    return ""


def tps_range(plan: Plan) -> tuple[float, float] | None:
    """(lowest, highest) tokens per second and device."""
    if plan.time is None:
        return None
    tokens = plan.layout.batch.tokens_per_step / plan.layout.world_size
    return tokens / plan.time.slowest_seconds, tokens / plan.time.fastest_seconds


def _expand(pattern: str) -> list[str]:
    """``a.{b,c}, d`` -> a.b, a.c, d."""
    found = []
    for part in re.split(r", (?![^{]*\})", pattern):
        head, brace, tail = part.partition("{")
        found += [head + name for name in tail.rstrip("}").split(",")] if brace else [part]
    return found


def _recompute(recompute: Recompute) -> dict[str, Any]:
    return {"name": recompute.describe(), **asdict(recompute)}


def _memory_dict(memory: MemoryPlan) -> dict[str, Any]:
    return {
        "reserved_bytes": memory.reserved_bytes,
        "allocated_bytes": memory.allocated_bytes,
        "by_category": memory.by_category,
        "by_pool": memory.by_pool,
        "host_bytes": memory.host_bytes,
    }


def _head(plan: Plan) -> list[str]:
    layout, batch = plan.layout, plan.layout.batch
    lines = [
        f"{plan.name} on {layout.world_size} x {plan.device.key}",
        f"  mesh        {layout.describe()}",
        f"  model       {plan.model.parameters:,} parameters, {plan.flops_per_token:,} FLOP per token",
        f"  batch       {batch.local_batch_size} local x {batch.dp_degree} ranks x "
        f"{batch.gradient_accumulation_steps} accumulated = {batch.global_batch_size} sequences of "
        f"{batch.seq_len}: {batch.tokens_per_step:,} tokens per step",
        f"  checkpoint  {plan.checkpoint_bytes / 1e9:,.1f} GB, "
        f"of the model alone {plan.model_bytes / 1e9:,.1f} GB",
    ]
    if len(plan.stages) > 1:
        cut = " | ".join(_stage(stage.layers) for stage in plan.stages)
        lines.append(f"  pipeline    {layout.stage_microbatches} micro-batches over {cut}")
    lines += [f"  {report.summary()}" for report in plan.model.reports]
    return lines


def _stage(layers: Sequence[int]) -> str:
    return f"layers {layers[0]}-{layers[-1]}" if layers else "no layers"


def _layers(plan: Plan) -> list[str]:
    rows = [("", "parameter", "global", "computed with", "kept", "sharding", "converter")]
    for parameter in all_parameters(plan):
        count = plan.model.n_layers if parameter in plan.model.block else 1
        rows.append(
            (
                f"{count} x",
                parameter.fqn,
                _shape(parameter.shape),
                _shape(parameter.local_shape),
                _shape(parameter.shard_shape),
                sharding(plan, parameter),
                decision(plan.model.reports, parameter),
            )
        )
    return ["layers", *aligned(rows)]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _memory(plan: Plan) -> list[str]:
    memory, have = plan.worst, plan.device_bytes
    where = f" (pipeline rank {memory.stage}, the fullest)" if len(plan.stages) > 1 else ""
    rows = [
        (name, f"{memory.by_category[name] / GIB:,.2f}") for name in CATEGORIES if memory.by_category[name]
    ]
    rows.append(("peak, reserved", f"{memory.reserved_bytes / GIB:,.2f}"))
    lines = [f"memory per rank, GiB{where}", *aligned(rows, right=(1,))]
    share = 100 * memory.reserved_bytes / have
    lines.append(f"  {share:.0f} % of the {have / GIB:.1f} GiB of {plan.device.key}: {_verdict(plan)}")
    lines.append(
        f"  tensors hold at most {memory.allocated_bytes / GIB:,.2f} at one time; "
        "the rest lies in pools that another stream cannot use"
    )
    if memory.host_bytes:
        lines.append(f"  and in host memory {memory.host_bytes / GIB:,.2f}")
    return lines


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return "fits"
    return f"DOES NOT FIT (usable: {100 * USABLE_SHARE:.0f} %)"


def _choices(plan: Plan) -> list[str]:
    rows = [("activation checkpointing", "GiB", "recompute, ms", "")]
    shown = list(plan.options)
    if plan.option.recompute not in [option.recompute for option in shown]:
        shown.append(plan.option)
    for option in shown:
        mark = "" if option.fits(plan.device_bytes) else "does not fit"
        if option.recompute == plan.option.recompute:
            mark = "<- chosen" if plan.automatic else "<- set"
        rows.append(
            (
                option.recompute.describe(),
                f"{option.worst.reserved_bytes / GIB:,.1f}",
                f"{1000 * option.recompute_seconds:,.1f}",
                mark,
            )
        )
    lines = ["what recomputing costs", *aligned(rows, right=(1, 2))]
    if plan.automatic:
        lines.append(f"  {describe(plan.option, plan.device_bytes)}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return []
    rows = [("", "over", "calls", "GB received", "where")]
    for item in plan.traffic:
        where = "within a host" if item.within_host else "between hosts"
        axes = " x ".join(axis for axis in item.axes if plan.layout.degrees[axis] > 1) or "all"
        rows.append((item.kind, axes, f"{item.calls:,}", f"{item.bytes / 1e9:,.3f}", where))
    return ["communication per rank and step", *aligned(rows, right=(2, 3))]


def _time(plan: Plan) -> list[str]:
    time, rates = plan.time, tps_range(plan)
    if time is None or rates is None:
        return [f"time: n/a, no ceilings are known for {plan.device.key}"]
    parts = [
        ("GEMMs", time.gemm_seconds),
        ("attention", time.attention_seconds),
        ("recompute", time.recompute_seconds),
        ("memory traffic", time.memory_seconds),
        ("optimizer", time.optimizer_seconds),
        ("communication", time.communication_seconds),
    ]
    rows = [(name, f"{1000 * seconds:,.1f}") for name, seconds in parts if seconds]
    mfu = [
        mfu_percent(tflops_per_device(rate, plan.flops_per_token), plan.device.peak_bf16_tflops)
        for rate in rates
    ]
    lines = ["time of a step, ms, at the device's ceilings", *aligned(rows, right=(1,))]
    if time.bubble:
        lines.append(f"  the pipeline idles {100 * time.bubble:.0f} % of the time")
    lines.append(
        f"  expected {time.fastest_seconds:,.3f} to {time.slowest_seconds:,.3f} s a step: "
        f"{rates[0]:,.0f} to {rates[1]:,.0f} tokens per second and device, mfu {mfu[0]:.0f} to {mfu[1]:.0f} %"
    )
    ceilings = "measured" if plan.device.measured else "estimated from the data sheet"
    lines.append(f"  ceilings of {plan.device.key}: {ceilings}")
    return lines
