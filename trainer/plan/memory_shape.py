"""From a model's shapes to the sizes that `memory.replay` needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parallelisms.peer_memory import piece_bytes
from trainer.config.derived import model_config
from trainer.plan.activations import BlockMemory, Recompute
from trainer.plan.layout import Layout, Stage
from trainer.plan.memory import MemoryPlan, Reduction, StepShape, Unit, replay
from trainer.plan.shapes import ModelShape, Parameter

_STATES = {"AdamW": 2, "Adam": 2}
"""Optimizer -> tensors it keeps for each parameter."""
_FP32 = 4


def plan_memory(
    config: Any, model: ModelShape, layout: Layout, stages: Sequence[Stage], recompute: Recompute
) -> list[MemoryPlan]:
    """The peak of every pipeline rank, in order (one without a pipeline)."""
    plans = []
    for stage in stages:
        plan = replay(step_shape(config, model, layout, stage, recompute))
        plans.append(
            MemoryPlan(plan.by_category, plan.by_pool, plan.allocated_bytes, plan.host_bytes, stage.rank)
        )
    return plans


def block_memory(config: Any, model: ModelShape, layout: Layout) -> BlockMemory:
    """Activation sizes of the model's blocks under this layout."""
    compiled = config.compile.enable and "model" in config.compile.components
    float8 = config.quantize.linear.float8
    # A compiler that sees PyTorch's casts may keep a weight that came in float8 turned for backward. Triton's
    # turn that one in backward, and keep what they make of a weight that came in the compute dtype.
    turned = float8.enable_fsdp_float8_all_gather != (float8.cast_kernels == "triton")
    linears = [linear for part in model.sizes.parts for linear in (*part.columnwise, *part.rowwise)]
    kept = 0
    if turned and float8.force_recompute_fp8_weight_in_bwd is not True:
        kept = sum(linear.k * linear.n for linear in linears if linear.float8)
    chosen = model_config(config)
    return BlockMemory(
        model.sizes,
        layout.tokens,
        layout.tp,
        element_bytes(config),
        compiled,
        kept,
        _kept_casts(float8, compiled),
        float8.saved_input in ("float8", "least"),
        fused_norm=getattr(chosen, "norm_kernel", "torch") == "fused",
        fused_product=getattr(chosen, "swiglu_kernel", "torch") == "fused",
    )


def _kept_casts(float8: Any, compiled: bool) -> tuple[str, ...] | None:
    """Roles of linears that keep the cast of their input; None where the compiler sees into casts."""
    if float8.cast_kernels != "triton":
        return None
    # A cast that does not wait for a gradient is one that the compiler does in forward.
    if float8.saved_input == "float8" or (compiled and float8.saved_input == "high_precision"):
        return ("columnwise", "rowwise")
    return ("columnwise",) if float8.saved_input == "least" else ()


def element_bytes(config: Any) -> int:
    """Bytes of one element in forward and backward."""
    return 2 if config.training.mixed_precision_param == "bfloat16" else 4


def step_shape(
    config: Any, model: ModelShape, layout: Layout, stage: Stage, recompute: Recompute
) -> StepShape:
    """All sizes of one rank's step."""
    units = _units(config, model, layout, stage, recompute)
    held = sum(unit.shard_numel for unit in units)
    reduction = _reduction(config, layout, units)
    keeps = config.quantize.linear.float8.keep_float8_shards is True
    if reduction.copies_bytes:
        units = tuple(replace(unit, gathered_bytes=0) for unit in units)
    master = 2 if config.training.dtype == "bfloat16" else 4
    logits, forward, saved, backward = _loss(config, model, layout) if stage.last else (0, 0, 0, 0)
    return StepShape(
        units,
        held * master,
        held * master * _STATES[config.optimizer.name],
        layout.fsdp_degree,
        stage.in_flight,
        layout.degrees["pp"] == 1 and layout.rounds > 1,
        layout.degrees["pp"] > 1 and layout.rounds > 1,
        logits,
        forward,
        saved,
        backward,
        element_bytes(config),
        master,
        config.training.enable_cpu_offload,
        reduction,
        sum(unit.float8_shard_numel for unit in units) if keeps else 0,
        _peer_weight_bytes(config, layout, units),
    )


def _reduction(config: Any, layout: Layout, units: tuple[Unit, ...]) -> Reduction:
    """As `parallelisms.fsdp` arranges it, or `parallelisms.direct_weights`."""
    if config.parallelism.fsdp_single_shard == "direct":
        copies = sum(unit.gathered_bytes for unit in units if unit.backward_reads_weights)
        return Reduction(copies_bytes=copies, widens=config.optimizer.implementation != "one_pass")
    how, replicas = config.parallelism.fsdp_reduce_scatter, layout.degrees["dp_replicate"]
    accumulates = layout.degrees["pp"] == 1 and layout.rounds > 1
    widens = how != "bfloat16_wire" or layout.fsdp_degree == 1
    wire = _FP32 if widens else element_bytes(config)
    received = max((unit.shard_numel for unit in units), default=0) * layout.fsdp_degree * wire
    return Reduction(
        wire_bytes=wire,
        in_compute_pool=how != "torch"
        and config.training.dtype == "float32"
        and not config.training.enable_cpu_offload
        and not (replicas > 1 and accumulates),
        divides=layout.fsdp_degree == 1 and replicas > 1,
        peer_bytes=0 if widens or not _copies(config, layout) else piece_bytes(received),
    )


def _copies(config: Any, layout: Layout) -> bool:
    """Whether GPUs copy from and to each other's memory, see `parallelisms.fsdp`."""
    return config.parallelism.fsdp_transport == "copy_engine" and layout.fsdp_degree > 1


def _peer_weight_bytes(config: Any, layout: Layout, units: tuple[Unit, ...]) -> int:
    """Of the two pieces that units pass their shards through, in turn; weights that are freed use none."""
    if not _copies(config, layout) or config.parallelism.reshards_after_forward(layout.fsdp_degree):
        return 0
    element = element_bytes(config)
    shards = [
        element * (unit.shard_numel - unit.float8_shard_numel) + unit.float8_shard_numel for unit in units
    ]
    turns = [*shards, *shards]  # of two steps: where units are odd in number, each has had both pieces
    return piece_bytes(max(turns[::2])) + piece_bytes(max(turns[1::2]))


def _units(
    config: Any, model: ModelShape, layout: Layout, stage: Stage, recompute: Recompute
) -> tuple[Unit, ...]:
    """FSDP's units in forward order, as `parallelisms.fsdp` makes them."""
    p = config.parallelism
    stays = not p.reshards_after_forward(layout.fsdp_degree)
    memory = block_memory(config, model, layout)
    final_input = 2 * memory._stream() if stage.last else 0  # of the last norm, and of the output
    units = []
    if stage.first and not model.tied_output:
        embedding = _unit("embedding", model.embedding, stays, 0, 0)
        units.append(replace(embedding, backward_reads_weights=False))
    for layer in stage.layers:
        mode = recompute.of_layer(layer)
        units.append(
            _unit(
                f"block {layer}",
                model.block,
                stays,
                memory.saved(mode, recompute.budget),
                memory.working(mode, recompute.budget),
            )
        )
    if model.tied_output:
        # One unit, gathered first and reduced last.
        units.insert(
            0, _unit("embedding, norm, output", (*model.embedding, *model.head), True, final_input, 0)
        )
    elif stage.last:
        units.append(_unit("norm, output", model.head, True, final_input, 0))
    return tuple(units)


def _unit(name: str, parameters: Sequence[Parameter], stays: bool, saved: int, working: int) -> Unit:
    return Unit(
        name,
        sum(p.local_numel * p.gather_bytes_per_element for p in parameters),
        sum(p.local_numel for p in parameters),
        sum(p.shard_numel for p in parameters),
        stays,
        saved,
        working,
        float8_shard_numel=sum(p.shard_numel for p in parameters if p.gather_bytes_per_element == 1),
    )


def _loss(config: Any, model: ModelShape, layout: Layout) -> tuple[int, int, int, int]:
    """Bytes of the logits, and of what the loss takes besides, as `_loss_sizes`.

    In chunks (`trainer.chunked_loss`) what stays until backward is the gradient of the output's weight, in
    the place of the logits: in fp32 where several chunks are added. With it there are a chunk's logits, and
    what the loss takes for them or the chunk's own gradient of the weight.
    """
    vocabulary, element = model.vocabulary, element_bytes(config)
    if not config.parallelism.disable_loss_parallel:
        vocabulary //= layout.tp
    chunk = config.training.loss_chunk_tokens
    logits = min(layout.tokens, chunk or layout.tokens) * vocabulary * element
    sizes = _loss_sizes(config, layout, logits)
    if not chunk:
        return logits, *sizes
    forward, saved, backward = sizes
    peak = logits + max(forward, max(saved - logits, 0) + backward)
    weight = model.vocabulary // layout.tp * model.sizes.width
    if layout.tokens <= chunk:
        kept = weight * element
        return kept, max(peak - kept, logits), kept, 0
    kept = weight * _FP32
    return kept, max(peak, logits + weight * element), kept, 0


def _loss_sizes(config: Any, layout: Layout, logits: int) -> tuple[int, int, int]:
    """(forward, kept for backward, backward) of the loss, in bytes besides the logits.

    Compiled, one kernel reads the logits, another writes their gradient. Eager, cross-entropy copies them
    to fp32, keeps their log-softmax, makes two gradients of that size; the sharded form has its own copies.
    The fused kernels write the gradient over the logits.
    """
    if config.training.loss_kernel == "fused":
        return 0, logits, 0
    if config.compile.enable and "loss" in config.compile.components:
        return 0, logits, logits
    fp32 = logits * _FP32 // element_bytes(config)
    if layout.tp > 1 and not config.parallelism.disable_loss_parallel:
        return 3 * fp32, logits, 3 * fp32 + logits
    return 2 * fp32, fp32, 2 * fp32
