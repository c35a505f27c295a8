"""Checks across sections: names in tables, batch and mesh arithmetic, flags that need each other.

Torch-free and before any process group, model or GPU exists. Three kinds of finding:

- `problems` stop everything: the configuration contradicts itself;
- `unavailable` stops a run but not a look at the config: it asks for what Octavo does not have (yet);
- `warnings` are settings that have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters import CONVERTERS
from models import MODELS
from trainer.checkpoint.remote import checkpoint_root
from trainer.config.derived import batch_arithmetic, dp_shard_degree, model_config
from trainer.config.errors import Problem, unknown
from trainer.config.fsdp_checks import fsdp_problems, fsdp_warnings, single_shard_problems
from trainer.config.load import Loaded
from trainer.config.loss_checks import loss_warnings
from trainer.config.pipeline_checks import pipeline_problems, pipeline_warnings
from trainer.data.datasets import DATASETS
from trainer.data.mixture import Entry, parse_mixture

ABSENT: dict[str, str] = {
    "fault_tolerance.": "torchft replica groups",
    "checkpoint.enable_ft_dataloader_checkpoints": "torchft replica groups",
    "memory_estimation.": "the memory-tracking script",
    "parallelism.expert_": "expert parallelism",
    "quantize.linear.mx.": "MXFP8",
    "quantize.grouped_mm.": "low-precision grouped GEMM",
}
"""Prefix of keys of which nothing exists -> what they are for; only their defaults are accepted."""


def problems(loaded: Loaded, world_size: int | None = None) -> list[Problem]:
    """Everything that contradicts itself; with `world_size`, the mesh too."""
    found = list(_name_problems(loaded))
    if not found:
        found += _model_problems(loaded)
    found += _parallel_problems(loaded)
    found += _combination_problems(loaded)
    found += fsdp_problems(loaded)
    found += _float8_problems(loaded)
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
    yield from _mixture_problems(loaded)
    if config.validation.dataset not in DATASETS:
        yield loaded.problem("validation.dataset", unknown("dataset", config.validation.dataset, DATASETS))


def _mixture_problems(loaded: Loaded) -> Iterator[Problem]:
    mixture = loaded.config.training.mixture
    if not mixture:
        return
    for key in ("training.dataset", "training.dataset_path"):
        if _changed(loaded, key):
            yield loaded.problem(key, "has no effect beside training.mixture; leave one of them out")
    try:
        entries = parse_mixture(mixture)
    except ValueError as error:
        yield loaded.problem("training.mixture", str(error))
        return
    for entry in entries:
        if entry.dataset not in DATASETS:
            yield loaded.problem("training.mixture", unknown("dataset", entry.dataset, DATASETS))


def mixture_entries(config: Any) -> list[Entry]:
    """The sources of the training mixture that exist; those that do not are `problems`."""
    try:
        entries = parse_mixture(config.training.mixture)
    except ValueError:
        return []
    return [entry for entry in entries if entry.dataset in DATASETS]


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
    two_chunks = cp > 1 and p.context_parallel_load_balancer is not None
    for section in ("training", "validation") if config.validation.enable else ("training",):
        length = getattr(config, section).seq_len
        # T = S / cp positions of a rank are two equal chunks, and are split over tp.
        parts = cp * math.lcm(tp, 2) if two_chunks else cp * tp
        if length % parts:
            degrees = f"tensor parallel {tp}, context parallel {cp}" + ", two chunks each" * two_chunks
            yield loaded.problem(f"{section}.seq_len", f"{length} is not divisible by {parts} ({degrees})")
    spec = MODELS.get(config.model.name)
    if spec is None or config.model.flavor not in spec.flavors:
        return
    model = model_config(config)
    for name in ("n_heads", "n_kv_heads", "vocab_size"):
        if tp > 1 and getattr(model, name) % tp:
            message = f"{tp} does not divide {name} = {getattr(model, name)} of {config.model.flavor}"
            yield loaded.problem("parallelism.tensor_parallel_degree", message)
    if tp > 1 and getattr(model, "norm_kernel", "torch") == "fused":
        message = "'fused' norms a whole stream, and tensor parallelism splits it; allowed: 'torch'"
        yield loaded.problem("model.overrides.norm_kernel", message)
    if cp > 1:
        yield from _context_problems(loaded, model)
    if not spec.problems(model):
        yield from pipeline_problems(loaded, spec.flop_inputs(model), model)


def _context_problems(loaded: Loaded, model: Any) -> Iterator[Problem]:
    """What a model's attention cannot do when its sequences are spread over ranks."""
    name, p = loaded.config.model.name, loaded.config.parallelism
    if not MODELS[name].attention:
        message = f"the model {name!r} names no attention modules (ModelSpec.attention)"
        yield loaded.problem("parallelism.context_parallel_degree", message)
    if getattr(model, "attn_backend", "auto") == "efficient":
        message = "'efficient' gives no log-sum-exp that context parallelism could merge; use 'auto'"
        yield loaded.problem("model.overrides.attn_backend", message)
    documents = getattr(model, "attn_mask_type", "causal") == "document"
    if documents and p.context_parallel_rotate_method == "alltoall":
        message = "with attn_mask_type 'document' keys and values are gathered; allowed: 'allgather'"
        yield loaded.problem("parallelism.context_parallel_rotate_method", message)


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
    if c.resilience.after_bad_steps == "roll_back" and not c.checkpoint.enable:
        yield loaded.problem("resilience.after_bad_steps", "roll_back needs checkpoint.enable")
    if c.checkpoint.last_save_in_hf and not c.checkpoint.last_save_model_only:
        yield loaded.problem("checkpoint.last_save_in_hf", "needs checkpoint.last_save_model_only")
    if c.checkpoint.last_save_in_hf and not isinstance(
        checkpoint_root(c.job.dump_folder, c.checkpoint.folder), Path
    ):
        yield loaded.problem("checkpoint.last_save_in_hf", "writes to a local folder, not to a URL")
    if c.checkpoint.initial_load_in_hf and not c.checkpoint.initial_load_model_only:
        message = "a Hugging Face folder holds the weights only: leave initial_load_model_only on"
        yield loaded.problem("checkpoint.initial_load_in_hf", message)
    spec = MODELS.get(c.model.name)
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(c.checkpoint, key) and spec is not None and spec.huggingface is None:
            yield loaded.problem(f"checkpoint.{key}", f"{c.model.name} has no Hugging Face format")
    if c.optimizer.implementation == "one_pass" and c.training.enable_cpu_offload:
        message = (
            "one_pass has a kernel for GPUs alone, and offloaded parameters are stepped on the host: fused"
        )
        yield loaded.problem("optimizer.implementation", message)
    if c.optimizer.early_step_in_backward and c.training.global_batch_size != -1:
        message = (
            "steps inside backward, so gradients cannot accumulate: leave training.global_batch_size at -1"
        )
        yield loaded.problem("optimizer.early_step_in_backward", message)


def _float8_problems(loaded: Loaded) -> Iterator[Problem]:
    c = loaded.config
    if c.quantize.linear.float8.keep_float8_shards is True and c.training.enable_cpu_offload:
        message = "has no effect with training.enable_cpu_offload: shards are on the CPU, and cast on the GPU"
        yield loaded.problem("quantize.linear.float8.keep_float8_shards", message)


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
    else:
        yield from single_shard_problems(
            loaded, world_size, batch_arithmetic(c, world_size).gradient_accumulation_steps
        )


def unavailable(loaded: Loaded) -> list[Problem]:
    """What the configuration asks for and this version does not have: refused, never ignored."""
    c = loaded.config
    p = c.parallelism
    wishes: list[tuple[str, bool, str]] = [
        (
            "parallelism.context_parallel_load_balancer",
            p.context_parallel_degree > 1 and p.context_parallel_load_balancer == "ptrr",
            "the load balancer 'ptrr' (there are 'headtail' and none)",
        ),
        (
            "checkpoint.initial_load_in_hf_quantized",
            c.checkpoint.initial_load_in_hf_quantized,
            "reading block-quantized weights (DeepSeek's form, which no Llama is published in)",
        ),
        (
            "comm.mode",
            c.comm.mode == "local_tensor",
            "comm.mode 'local_tensor' (all ranks' tensors in one process; 'fake_backend' is there)",
        ),
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
    recompute = c.activation_checkpoint.mode
    idle = [
        (
            "activation_checkpoint.selective_ac_option",
            recompute == "selective",
            f"activation_checkpoint.mode is {recompute}",
        ),
        (
            "activation_checkpoint.memory_budget",
            recompute == "memory_budget",
            f"activation_checkpoint.mode is {recompute}",
        ),
        ("compile.", c.compile.enable, "compile.enable is off"),
        ("validation.", c.validation.enable, "validation.enable is off"),
        ("checkpoint.", c.checkpoint.enable, "checkpoint.enable is off"),
    ]
    for prefix, on, reason in idle:
        keys = [] if on else [key for key in _changed(loaded, prefix) if key in _command_line_keys(loaded)]
        found += [f"{key} has no effect: {reason}" for key in keys]
    if _changed(loaded, "checkpoint.export_dtype") and not c.checkpoint.last_save_model_only:
        found.append("checkpoint.export_dtype has no effect: checkpoint.last_save_model_only is off")
    found += [*_idle_resilience(loaded), *loss_warnings(loaded)]
    if c.lr_scheduler.warmup_steps > (c.lr_scheduler.total_steps or c.training.steps):
        found.append(
            f"lr_scheduler.warmup_steps {c.lr_scheduler.warmup_steps} is cut to the length of the run"
        )
    found += pipeline_warnings(loaded, _changed(loaded, "parallelism."))
    if c.parallelism.context_parallel_degree == 1:
        keys = _changed(loaded, "parallelism.context_parallel_")
        found += [f"{key} has no effect: context_parallel_degree is 1" for key in keys]
    found += fsdp_warnings(loaded)
    found += _saved_input_warnings(loaded)
    if c.parallelism.enable_async_tensor_parallel and c.parallelism.tensor_parallel_degree == 1:
        found.append("parallelism.enable_async_tensor_parallel has no effect: tensor_parallel_degree is 1")
    return found


def _saved_input_warnings(loaded: Loaded) -> list[str]:
    config = loaded.config
    spec = MODELS.get(config.model.name)
    if config.quantize.linear.float8.saved_input != "least" or spec is None:
        return []
    if config.model.flavor not in spec.flavors:
        return []
    if getattr(model_config(config), "swiglu_kernel", "torch") != "fused" or not config.compile.enable:
        return []
    key = "quantize.linear.float8.saved_input"
    return [
        f"{key} = 'least' keeps more than 'float8' with swiglu_kernel = 'fused', whose product the compiler "
        "cannot make again"
    ]


def _idle_resilience(loaded: Loaded) -> list[str]:
    c = loaded.config.resilience
    needs = [
        ("loss_spike_factor", c.skip_bad_steps, "resilience.skip_bad_steps is off"),
        ("max_bad_steps", c.skip_bad_steps, "resilience.skip_bad_steps is off"),
        ("after_bad_steps", c.skip_bad_steps, "resilience.skip_bad_steps is off"),
        ("after_bad_steps", c.max_bad_steps > 0, "resilience.max_bad_steps is 0"),
        ("max_roll_backs", c.after_bad_steps == "roll_back", "resilience.after_bad_steps is 'stop'"),
    ]
    keys = [(f"resilience.{name}", works, reason) for name, works, reason in needs]
    return [
        f"{key} has no effect: {reason}" for key, works, reason in keys if not works and _changed(loaded, key)
    ]


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
