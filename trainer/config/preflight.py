"""All checks that a run passes before torch is imported, a process started or a device touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from trainer.config import checks
from trainer.config.errors import ConfigError, Problem
from trainer.config.load import Loaded, load
from trainer.data.datasets import check_dataset
from trainer.data.tokenizer import find_tokenizer_file


def preflight(argv: Sequence[str], world_size: int) -> Loaded:
    """Load and check a configuration for a run of `world_size` processes.

    Raises:
        ConfigError: with everything that is wrong.
    """
    loaded = load(argv)
    found = checks.problems(loaded, world_size) + checks.unavailable(loaded)
    if loaded.config.comm.mode != "fake_backend":  # a dry run reads nothing
        found += input_problems(loaded)
    if found:
        raise ConfigError(found)
    return loaded


def input_problems(loaded: Loaded) -> list[Problem]:
    """Files and folders that the run will read."""
    found: list[Problem] = []
    sections = ["training"] + (["validation"] if loaded.config.validation.enable else [])
    for name in sections:
        section = getattr(loaded.config, name)
        key = f"{name}.dataset_path" if section.dataset_path else f"{name}.dataset"
        if section.dataset in checks.DATASETS:
            _collect(found, loaded, key, partial(check_dataset, section.dataset, section.dataset_path))
    path = loaded.config.model.hf_assets_path
    _collect(found, loaded, "model.hf_assets_path", partial(find_tokenizer_file, path))
    return found


def _collect(found: list[Problem], loaded: Loaded, key: str, check: Callable[[], object]) -> None:
    try:
        check()
    except ValueError as error:
        found.append(loaded.problem(key, str(error)))
