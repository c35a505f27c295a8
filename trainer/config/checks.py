"""Checks across sections: names in tables, batch and mesh arithmetic, flags that need each other.

Torch-free and before any process group, model or GPU exists. Three kinds of finding:

- `problems` stop everything: the configuration contradicts itself;
- `unavailable` stops a run but not a look at the config: it asks for what Octavo does not have (yet);
- `warnings` are settings that have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from converters import CONVERTERS
from models import MODELS
from trainer.config.errors import Problem, unknown
from trainer.config.load import Loaded
from trainer.config.pipeline_checks import pipeline_problems, pipeline_warnings
from trainer.data.datasets import DATASETS

ABSENT: dict[str, str] = {
    "fault_tolerance.": "torchft replica groups",
    "memory_estimation.": "the memory-tracking script",
    "parallelism.expert_": "expert parallelism",
    "quantize.linear.mx.": "MXFP8",
    "quantize.grouped_mm.": "low-precision grouped GEMM",
}
"""Prefix of keys of which nothing exists -> what they are for; only their defaults are accepted."""


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


def problems(loaded: Loaded, world_size: int | None = None) -> list[Problem]:
    """Everything that contradicts itself; with `world_size`, the mesh too."""
    found = list(_name_problems(loaded))
    if not found:
        found += _model_problems(loaded)
    found += _parallel_problems(loaded)
    found += _combination_problems(loaded)
    if world_size is not None:
        found += _world_problems(loaded, world_size)
    return found


def _name_problems(loaded: Loaded) -> Iterator[Problem]:
    config = loaded.config
    spec = MODELS.get(config.model.name)
    if spec is None:
        yield loaded.problem("model.name", unknown("model", config.model.name, MODELS))
    elif config.model.flavor not in spec.flavors:
        kind = f"flavor of {config.model.name}"
        yield loaded.problem("model.flavor", unknown(kind, config.model.flavor, spec.flavors))
    for name in config.model.converters:
        if name not in CONVERTERS:
            yield loaded.problem("model.converters", unknown("converter", name, CONVERTERS))
    if config.training.dataset not in DATASETS:
        yield loaded.problem("training.dataset", unknown("dataset", config.training.dataset, DATASETS))
    if config.validation.dataset not in DATASETS:
        yield loaded.problem("validation.dataset", unknown("dataset", config.validation.dataset, DATASETS))


def _model_problems(loaded: Loaded) -> Iterator[Problem]:
    spec = MODELS[loaded.config.model.name]
    for name, message in spec.problems(model_config(loaded.config)):
        key = f"model.overrides.{name}"
        given = key in loaded.origins
        yield loaded.problem(key if given else "model.flavor", message if given else f"{name} {message}")
    rows = [CONVERTERS[name] for name in loaded.config.model.converters]
    for row in {id(row): row for row in rows if rows.count(row) > 1}.values():
        yield loaded.problem("model.converters", f"names {row.section} more than once")


def _parallel_problems(loaded: Loaded) -> Iterator[Problem]:
    config, p = loaded.config, loaded.config.parallelism
    tp, cp = p.tensor_parallel_degree, p.context_parallel_degree
    for section in ("training", "validation") if config.validation.enable else ("training",):
        length = getattr(config, section).seq_len
        parts = tp * (2 * cp if cp > 1 else 1)
        if length % parts:
            message = f"{length} is not divisible by {parts} (tensor parallel {tp}, context parallel {cp}"
            yield loaded.problem(f"{section}.seq_len", message + (", two chunks each)" if cp > 1 else ")"))
    spec = MODELS.get(config.model.name)
    if spec is None or config.model.flavor not in spec.flavors:
        return
    model = model_config(config)
    for name in ("n_heads", "n_kv_heads", "vocab_size"):
        if tp > 1 and getattr(model, name) % tp:
            message = f"{tp} does not divide {name} = {getattr(model, name)} of {config.model.flavor}"
            yield loaded.problem("parallelism.tensor_parallel_degree", message)
    if not spec.problems(model):
        yield from pipeline_problems(loaded, spec.flop_inputs(model))


def _combination_problems(loaded: Loaded) -> Iterator[Problem]:
    c = loaded.config
    compiled = c.compile.enable and "model" in c.compile.components
    if (
        c.parallelism.enable_async_tensor_parallel
        and not compiled
        and c.parallelism.tensor_parallel_degree > 1
    ):
        yield loaded.problem("parallelism.enable_async_tensor_parallel", "needs compile.enable of the model")
    if c.activation_checkpoint.mode == "memory_budget" and not compiled:
        message = (
            "memory_budget is the compiler's work: it needs compile.enable with 'model' among its components"
        )
        yield loaded.problem("activation_checkpoint.mode", message)
    if c.checkpoint.keep_latest_k == 1:
        message = "got 1, the only one could be lost while the next is written; allowed: 0 (all), 2 and more"
        yield loaded.problem("checkpoint.keep_latest_k", message)
    if c.checkpoint.last_save_in_hf and not c.checkpoint.last_save_model_only:
        yield loaded.problem("checkpoint.last_save_in_hf", "needs checkpoint.last_save_model_only")
    if c.optimizer.early_step_in_backward and c.training.global_batch_size != -1:
        message = (
            "steps inside backward, so gradients cannot accumulate: leave training.global_batch_size at -1"
        )
        yield loaded.problem("optimizer.early_step_in_backward", message)


def _world_problems(loaded: Loaded, world_size: int) -> Iterator[Problem]:
    c, p = loaded.config, loaded.config.parallelism
    shard = dp_shard_degree(c, world_size)
    if shard == 0:
        degrees = {
            "pp": p.pipeline_parallel_degree,
            "dp_replicate": p.data_parallel_replicate_degree,
            "dp_shard": p.data_parallel_shard_degree,
            "cp": p.context_parallel_degree,
            "tp": p.tensor_parallel_degree,
        }
        shown = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
        yield Problem("parallelism", f"{shown} does not fit {world_size} processes (NGPU x NNODES)")
        return
    dp = p.data_parallel_replicate_degree * shard
    micro, total = c.training.local_batch_size * dp, c.training.global_batch_size
    if total != -1 and (total < micro or total % micro):
        local = c.training.local_batch_size
        message = (
            f"{total} is not a multiple of {micro} (local_batch_size {local} x {dp} data-parallel ranks)"
        )
        yield loaded.problem("training.global_batch_size", message)


def unavailable(loaded: Loaded) -> list[Problem]:
    """What the configuration asks for and this version does not have: refused, never ignored."""
    c = loaded.config
    p = c.parallelism
    wishes: list[tuple[str, bool, str]] = [
        ("parallelism.context_parallel_degree", p.context_parallel_degree > 1, "context parallelism"),
        ("checkpoint.last_save_in_hf", c.checkpoint.last_save_in_hf, "export to Hugging Face's format"),
        ("checkpoint.initial_load_in_hf", c.checkpoint.initial_load_in_hf, "loading Hugging Face's format"),
        (
            "checkpoint.initial_load_in_hf_quantized",
            c.checkpoint.initial_load_in_hf_quantized,
            "loading Hugging Face's format",
        ),
        ("comm.mode", c.comm.mode != "default", f"comm.mode {c.comm.mode!r}"),
        ("optimizer.early_step_in_backward", c.optimizer.early_step_in_backward, "stepping inside backward"),
        ("debug.moe_force_load_balance", c.debug.moe_force_load_balance, "mixture-of-experts"),
    ]
    asked = [(key, what) for key, wanted, what in wishes if wanted]
    asked += [(key, what) for prefix, what in ABSENT.items() for key in _changed(loaded, prefix)]
    return [loaded.problem(key, f"{what} is not available in this version") for key, what in asked]


def warnings(loaded: Loaded) -> list[str]:
    """Settings that change nothing in this run, each with the reason."""
    c = loaded.config
    found = []
    active = {CONVERTERS[name].section for name in c.model.converters if name in CONVERTERS}
    for section in {row.section for row in CONVERTERS.values()} - active:
        keys = _changed(loaded, f"{section}.")
        if keys:
            found.append(f"[{section}] has no effect: no converter of that name in model.converters")
    idle = [
        ("compile.", c.compile.enable, "compile.enable is off"),
        ("validation.", c.validation.enable, "validation.enable is off"),
        ("checkpoint.", c.checkpoint.enable, "checkpoint.enable is off"),
    ]
    for prefix, on, reason in idle:
        keys = [] if on else [key for key in _changed(loaded, prefix) if key in _command_line_keys(loaded)]
        found += [f"{key} has no effect: {reason}" for key in keys]
    if _changed(loaded, "checkpoint.export_dtype") and not c.checkpoint.last_save_model_only:
        found.append("checkpoint.export_dtype has no effect: checkpoint.last_save_model_only is off")
    if c.lr_scheduler.warmup_steps > (c.lr_scheduler.total_steps or c.training.steps):
        found.append(
            f"lr_scheduler.warmup_steps {c.lr_scheduler.warmup_steps} is cut to the length of the run"
        )
    found += pipeline_warnings(loaded, _changed(loaded, "parallelism."))
    if c.parallelism.context_parallel_degree == 1:
        keys = _changed(loaded, "parallelism.context_parallel_")
        found += [f"{key} has no effect: context_parallel_degree is 1" for key in keys]
    if c.parallelism.enable_async_tensor_parallel and c.parallelism.tensor_parallel_degree == 1:
        found.append("parallelism.enable_async_tensor_parallel has no effect: tensor_parallel_degree is 1")
    return found


def _known_converters(config: Any) -> list[str]:
    return [name for name in config.model.converters if name in CONVERTERS]


def _changed(loaded: Loaded, prefix: str) -> list[str]:
    """Keys below `prefix` that the user set to something else than the default."""
    return [
        key
        for key in loaded.origins
        if key.startswith(prefix)
        and loaded.given(key)
        and loaded.values[key] != loaded.schema.keys[key].default
    ]


def _command_line_keys(loaded: Loaded) -> set[str]:
    """Keys set by a flag: a TOML file may keep settings of a feature that is off, a flag hardly means to."""
    return {key for key, origin in loaded.origins.items() if origin.startswith("--")}
