"""Older spellings of keys, and keys that are gone. One row each, for TOML and command line alike."""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, str] = {
    "float8": "quantize.linear.float8",
    "mx": "quantize.linear.mx",
    "training.compile": "compile.enable",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
    "training.batch_size": "training.local_batch_size",
    "job.print_args": "job.print_config",
    "model.tokenizer_path": "model.hf_assets_path",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "memory_estimation.enabled": "memory_estimation.enable",
    "experimental.custom_args_module": "job.custom_config_module",
}
"""Old name -> new name. A row may name a section: everything below it moves with it."""

RETIRED: dict[str, tuple[Any, str]] = {
    "parallelism.enable_compiled_autograd": (False, "compiled autograd is not used; remove the key"),
}
"""Key -> (the value that may stay, what to say of any other)."""


def rename(key: str) -> str:
    """The present name of `key`; itself when it has no older spelling."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        head = ".".join(parts[:length])
        if head in ALIASES:
            return ".".join([ALIASES[head], *parts[length:]])
    return key
