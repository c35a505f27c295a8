"""Checks of the settings of pipeline parallelism against each other, the model and the batch. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from models import MODELS
from models.spec import FlopInputs
from parallelisms.pipeline_schedules import (
    FROM_FILE,
    SCHEDULES,
    StageError,
    microbatch_problems,
    splits_backward,
)
from parallelisms.pipeline_stages import StageLayout, outside_blocks, stage_layout
from trainer.config.errors import Problem
from trainer.config.load import Loaded

_KEY = "parallelism.pipeline_parallel_"


def stages_of(config: Any, n_layers: int) -> StageLayout:
    """What each pipeline stage of a configuration holds, and on which rank of the ``pp`` axis it is.

    Raises:
        StageError: the settings contradict each other or the model.
    """
    spec = MODELS[config.model.name]
    before, after = outside_blocks(spec.roles)
    return stage_layout(config.parallelism, n_layers, blocks=spec.blocks, before=before, after=after)


def pipeline_problems(loaded: Loaded, flops: FlopInputs, model: Any) -> Iterator[Problem]:
    """What keeps the pipeline of a configuration from being built; nothing where there is none.

    Args:
        loaded: With a known model and flavor.
        flops: The model's `FlopInputs`.
        model: The model's own configuration.
    """
    p, c = loaded.config.parallelism, loaded.config
    degree, name = p.pipeline_parallel_degree, p.pipeline_parallel_schedule
    n_layers = flops.n_layers
    if degree == 1:
        return
    if flops.tied_output:
        message = (
            f"the output of {c.model.flavor} is tied to its embedding: one weight, which the first and the\n"
            "  last stage would both need; set model.overrides.tied_output = false, or the degree to 1"
        )
        yield loaded.problem(f"{_KEY}degree", message)
    if degree > n_layers:
        message = f"{degree} stages for {n_layers} layers; allowed: at most one stage per layer"
        yield loaded.problem(f"{_KEY}degree", message)
        return
    if name not in SCHEDULES and name != FROM_FILE:
        known = ", ".join([*SCHEDULES, FROM_FILE])
        yield loaded.problem(f"{_KEY}schedule", f"{name} is a base class and no order; allowed: {known}")
        return
    if p.pipeline_parallel_schedule_csv and name != FROM_FILE:
        message = f"is read by {FROM_FILE} alone, the schedule is {name}"
        yield loaded.problem(f"{_KEY}schedule_csv", message)
    try:
        yield from _schedule_problems(loaded, stages_of(c, n_layers).count, model)
    except StageError as error:
        yield loaded.problem(f"parallelism.{error.key}", str(error))


def _schedule_problems(loaded: Loaded, stages: int, model: Any) -> Iterator[Problem]:
    p, c = loaded.config.parallelism, loaded.config
    name = p.pipeline_parallel_schedule
    for message in microbatch_problems(p, stages, c.training.local_batch_size):
        yield loaded.problem(f"{_KEY}microbatch_size", message)
    if not splits_backward(p):
        return
    if c.compile.enable and "model" in c.compile.components:
        message = (
            f"{name} computes the gradients of inputs and weights apart, a compiled block both at once;\n"
            "  take Interleaved1F1B, or leave 'model' out of compile.components"
        )
        yield loaded.problem(f"{_KEY}schedule", message)
    if c.activation_checkpoint.mode == "selective" and c.activation_checkpoint.selective_ac_option == "op":
        message = (
            f"per-op checkpointing serves one backward, {name} runs two; allowed: 'none', or full blocks"
        )
        yield loaded.problem("activation_checkpoint.mode", message)
    if getattr(model, "norm_kernel", "torch") == "fused":
        # Until torch 2.12 the second half starts at an operation's first result, and this one has several.
        message = (
            f"{name} computes the gradients of inputs and weights apart, 'fused' both at once; use 'torch'"
        )
        yield loaded.problem("model.overrides.norm_kernel", message)
    if p.fsdp_reshard_after_forward == "always":
        message = (
            f"'always' frees weights that {name} reads in both halves of backward; allowed: default, never"
        )
        yield loaded.problem("parallelism.fsdp_reshard_after_forward", message)


def pipeline_warnings(loaded: Loaded, changed: list[str]) -> Iterator[str]:
    """Settings of a pipeline that change nothing, or that leave ranks idle.

    Args:
        loaded: A checked configuration.
        changed: Keys of the parallelism section that are not at their default.
    """
    p = loaded.config.parallelism
    if p.pipeline_parallel_degree == 1:
        idle = [key for key in changed if key.startswith(_KEY) or key.endswith("module_fqns_per_model_part")]
        yield from (f"{key} has no effect: pipeline_parallel_degree is 1" for key in idle)
        return
    if not p.pipeline_parallel_expert_parallel_overlap:
        yield f"{_KEY}expert_parallel_overlap has no effect: the model has no experts"
    if p.module_fqns_per_model_part is not None:
        for part in ("first_stage_less_layers", "last_stage_less_layers", "layers_per_stage"):
            if f"{_KEY}{part}" in changed:
                yield f"{_KEY}{part} has no effect: module_fqns_per_model_part says what a stage has"
    name = p.pipeline_parallel_schedule
    if name in SCHEDULES and SCHEDULES[name].splits_backward:
        if loaded.config.activation_checkpoint.mode != "none":
            yield (
                f"{name} computes a checkpointed block again for its input and for each of its matrices; "
                "Interleaved1F1B does so once"
            )
        if loaded.config.model.converters:
            yield f"{name} runs a converted linear's backward twice, for its input and for its weight"
    count = loaded.config.training.local_batch_size // p.pipeline_parallel_microbatch_size
    if count < p.pipeline_parallel_degree:
        yield (
            f"{count} micro-batches for {p.pipeline_parallel_degree} pipeline ranks: some always wait; "
            "raise training.local_batch_size or lower pipeline_parallel_microbatch_size"
        )
