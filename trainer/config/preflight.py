"""All checks that a run passes before torch is imported, a process started or a device touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from models import MODELS
from trainer.config import checks, derived
from trainer.config.errors import ConfigError, Problem
from trainer.config.load import Loaded, load
from trainer.data.datasets import check_dataset
from trainer.data.tokenizer import check_vocabulary, find_tokenizer_file


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
    for key, data_check in _data_checks(loaded):
        _collect(found, loaded, key, data_check)
    path, model = loaded.config.model.hf_assets_path, loaded.config.model
    if model.name in MODELS and model.flavor in MODELS[model.name].flavors:
        size = derived.model_config(loaded.config).vocab_size
        check: Callable[[], object] = partial(check_vocabulary, path, size, model.flavor)
    else:
        check = partial(find_tokenizer_file, path)
    _collect(found, loaded, "model.hf_assets_path", check)
    return found


def _data_checks(loaded: Loaded) -> Iterator[tuple[str, Callable[[], object]]]:
    """The key and the check of every dataset that the run reads."""
    config = loaded.config
    for entry in checks.mixture_entries(config):
        yield "training.mixture", partial(check_dataset, entry.dataset, entry.path)
    sections = [] if config.training.mixture else ["training"]
    for name in sections + (["validation"] if config.validation.enable else []):
        section = getattr(config, name)
        key = f"{name}.dataset_path" if section.dataset_path else f"{name}.dataset"
        if section.dataset in checks.DATASETS:
            yield key, partial(check_dataset, section.dataset, section.dataset_path)


def _collect(found: list[Problem], loaded: Loaded, key: str, check: Callable[[], object]) -> None:
    try:
        check()
    except ValueError as error:
        found.append(loaded.problem(key, str(error)))
