"""Bytes that a rank receives in one optimizer step, by kind.

A collective over n ranks moves, for a tensor of s bytes (whole):

    all-gather, reduce-scatter    s (n - 1) / n
    all-reduce                    2 s (n - 1) / n

and a send moves s. Copies between GPUs move what the collective does that they replace, and have its name.
Scalars (losses, token counts, gradient norms, float8 scales) are counted as calls; their bytes are nothing
beside the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.plan.activations import Recompute
from trainer.plan.layout import Layout, Stage
from trainer.plan.memory_shape import element_bytes
from trainer.plan.shapes import ModelShape, Parameter, Part

_FP32 = 4
_FLOAT8 = 1


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank in one step."""

    kind: str
    """``all-gather``, ``reduce-scatter``, ``all-reduce of replicas``, ``tensor parallel``, ..."""
    axes: tuple[str, ...]
    """The mesh axes that it runs over."""
    calls: int
    bytes: int
    within_host: bool


def plan_communication(
    config: Any, model: ModelShape, layout: Layout, stage: Stage, recompute: Recompute
) -> list[Traffic]:
    """All traffic of one pipeline rank, kinds without any left out."""
    found = [
        *_fsdp(config, model, layout, stage),
        *_replicas(model, layout, stage),
        *_tensor_parallel(config, model, layout, stage, recompute),
        *_context_parallel(config, model, layout, stage, recompute),
        *_pipeline(config, model, layout, stage),
        *_scalars(config, model, layout),
    ]
    return [traffic for traffic in found if traffic.calls]


def _units(model: ModelShape, stage: Stage) -> list[tuple[Sequence[Parameter], bool]]:
    """(parameters, whether they are gathered for forward alone) of every FSDP unit.

    [norm, output] stays gathered until its backward; the backward of an embedding of its own reads no weight.
    """
    blocks: list[tuple[Sequence[Parameter], bool]] = [(model.block, False)] * len(stage.layers)
    if model.tied_output:
        return [((*model.embedding, *model.head), True), *blocks]
    first: list[tuple[Sequence[Parameter], bool]] = [(model.embedding, True)] if stage.first else []
    return [*first, *blocks, *([(model.head, True)] if stage.last else [])]


def _fsdp(config: Any, model: ModelShape, layout: Layout, stage: Stage) -> list[Traffic]:
    n = layout.fsdp_degree
    if n == 1:
        return []
    stay = not config.parallelism.reshards_after_forward(n)
    wire = element_bytes(config) if config.parallelism.fsdp_reduce_scatter == "bfloat16_wire" else _FP32
    # A pipeline gathers and reduces once for all its micro-batches.
    steps = 1 if layout.degrees["pp"] > 1 else layout.rounds
    gathers = gathered = reduced = 0
    units = _units(model, stage)
    for parameters, once in units:
        times = 1 if once or stay else 2
        gathers += times
        gathered += times * sum(p.shard_numel * n * p.gather_bytes_per_element for p in parameters)
        reduced += sum(p.shard_numel * n for p in parameters) * wire
    axes = ("dp_shard", "cp")
    inside = layout.within_host(*axes)
    return [
        Traffic("all-gather of weights", axes, steps * gathers, steps * gathered * (n - 1) // n, inside),
        Traffic(
            "reduce-scatter of gradients", axes, steps * len(units), steps * reduced * (n - 1) // n, inside
        ),
    ]


def _replicas(model: ModelShape, layout: Layout, stage: Stage) -> list[Traffic]:
    n = layout.degrees["dp_replicate"]
    if n == 1:
        return []
    units = _units(model, stage)
    size = sum(p.shard_numel for parameters, _ in units for p in parameters) * _FP32
    inside = layout.within_host("dp_replicate")
    return [
        Traffic("all-reduce over replicas", ("dp_replicate",), len(units), 2 * size * (n - 1) // n, inside)
    ]


def _tensor_parallel(
    config: Any, model: ModelShape, layout: Layout, stage: Stage, recompute: Recompute
) -> list[Traffic]:
    """A part gathers its input and scatters its output; backward mirrors both."""
    n = layout.tp
    if n == 1:
        return []
    element, width = element_bytes(config), model.sizes.width
    rounds = layout.rounds
    tokens = layout.tokens * rounds
    calls = size = 0
    for layer in stage.layers:
        again = recompute.of_layer(layer) in ("full", "op")
        for part in model.sizes.parts:
            gather, back = _wire(part, element)
            # Forward: gather, scatter. Backward: gather what was scattered, scatter. Then what was not kept.
            recomputed = gather + (element if recompute.of_layer(layer) == "full" else 0) if again else 0
            size += (gather + element + back + element + recomputed) * width
            calls += 4 + (again + (recompute.of_layer(layer) == "full"))
    for present in (stage.first, stage.last):  # the embedding's output; the output's input
        size += 2 * element * width * present
        calls += 2 * present
    inside = layout.within_host("tp")
    return [
        Traffic("tensor parallel", ("tp",), calls * rounds, size * tokens * (n - 1) // n, inside),
        _sums(config, model, layout, stage, rounds),
    ]


def _sums(config: Any, model: ModelShape, layout: Layout, stage: Stage, rounds: int) -> Traffic:
    """What a group adds up: the loss, and the gradients of norms, which saw one rank's positions."""
    norms = [p for p in model.block if p.role == "norm"] * len(stage.layers)
    norms += [p for p in model.head if p.role == "norm"] if stage.last else []
    size = sum(p.local_numel for p in norms) * element_bytes(config)
    calls = len(norms)
    if stage.last and not config.parallelism.disable_loss_parallel:
        calls += 2  # the largest logit, then two sums
        size += 3 * layout.tokens * _FP32
    received = 2 * rounds * size * (layout.tp - 1) // layout.tp
    return Traffic("tensor-parallel sums", ("tp",), calls * rounds, received, layout.within_host("tp"))


def _wire(part: Part, element: int) -> tuple[int, int]:
    """Bytes an element of (the gather of a part's input, the gather of its output's gradient)."""
    gather = _FLOAT8 if all(linear.float8_gather for linear in part.columnwise) else element
    back = _FLOAT8 if all(linear.float8_gather for linear in part.rowwise) else element
    return gather, back


def _context_parallel(
    config: Any, model: ModelShape, layout: Layout, stage: Stage, recompute: Recompute
) -> list[Traffic]:
    """Keys and values of all other ranks, in forward and in backward, and their gradients back."""
    n = layout.degrees["cp"]
    if n == 1:
        return []
    element = element_bytes(config)
    attention = next(part for part in model.sizes.parts if part.is_attention)
    keys_values = sum(sorted(linear.n for linear in attention.columnwise)[:2])
    rounds = layout.rounds
    forwards = sum(2 if recompute.of_layer(layer) == "full" else 1 for layer in stage.layers)
    one = layout.tokens * keys_values * (n - 1)
    backward = one * (element + _FP32) * len(stage.layers)
    size = rounds * (forwards * one * element + backward)
    calls = rounds * (forwards + 2 * len(stage.layers))
    return [Traffic("context parallel", ("cp",), calls, size, layout.within_host("cp"))]


def _pipeline(config: Any, model: ModelShape, layout: Layout, stage: Stage) -> list[Traffic]:
    if layout.degrees["pp"] == 1:
        return []
    rounds = layout.rounds
    # Activations come from the stage before, gradients from the one after.
    messages = rounds * ((not stage.first) + (not stage.last))
    size = messages * layout.tokens * model.sizes.width * element_bytes(config) // layout.tp
    return [Traffic("pipeline", ("pp",), messages, size, layout.within_host("pp"))]


def _scalars(config: Any, model: ModelShape, layout: Layout) -> list[Traffic]:
    """The gradient norm, the count of valid tokens, and the scales of a float8 all-gather."""
    if layout.world_size == 1:
        return []
    float8 = [p for p in model.block if p.gather_bytes_per_element == _FLOAT8]
    weights = len(float8) * model.n_layers
    precomputed = config.quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp
    scales = (1 if precomputed else 2 * weights) if weights else 0
    return [
        Traffic(
            "norms and scales",
            ("dp_shard",),
            2 + scales,
            _FP32 * (2 + weights),
            layout.within_host("dp_shard"),
        )
    ]
