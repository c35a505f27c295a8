"""Whether a checkpoint fits this run, and whether this run's checkpoints will fit on its disk. Torch-free."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from trainer.checkpoint import changes, folders
from trainer.checkpoint.choose import Found
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.remote import Place
from trainer.config.errors import ConfigError, Problem

log = logging.getLogger(__name__)


def misfit(found: Found, root: Place, message: str, differences: Mapping[str, tuple[Any, Any]]) -> Exception:
    """The error for a checkpoint that is whole and does not fit, with the setting that is to blame.

    Args:
        found: The checkpoint.
        root: Where this run saves.
        message: What does not fit.
        differences: Of `changes.changed`.
    """
    key = changes.culprit(differences, "model")
    if not found.is_own or key is None:
        return CheckpointError(f"{found.folder} {message}\n  it is of another model than this run's")
    then, now = differences[key]
    text = (
        f"the run in {root} has {key} = {then}, now it is {now}\n"
        f"  {found.folder.name} {message}\n  set it as it was, or choose another job.dump_folder"
    )
    return ConfigError([Problem(key, text)])


def data_misfit(found: Found, message: str) -> ConfigError:
    """The error for a checkpoint of other data."""
    lines = message.splitlines()[:2]
    lines.append("  set it as it was, or start the data anew: checkpoint.exclude_from_loading=dataloader")
    return ConfigError([Problem(found.folder.name, "\n".join(lines))])


def check_function(found: Found, root: Place, config: Any) -> None:
    """Refuse settings with which the weights of this run's own checkpoint would compute something else.

    Weights from elsewhere may be used otherwise than they were trained (a longer context, say): a warning
    names what differs.

    Raises:
        ConfigError: a setting differs, and `checkpoint.accept_model_changes` is off.
    """
    differences = changes.changed_function(found.manifest.model, changes.model_settings(config))
    if not differences:
        return
    if found.is_own and not config.checkpoint.accept_model_changes:
        key, (then, now) = next(iter(differences.items()))
        text = (
            f"the run in {root} has {key} = {then}, now {now}: its weights were not trained so\n"
            "  set it as it was, or accept it with --checkpoint.accept_model_changes"
        )
        raise ConfigError([Problem(f"model: {key}", text)])
    log.warning("the weights were trained with another model: %s", changes.describe(differences))


def check_space(root: Place, size: int, config: CheckpointConfig, last_step: int) -> str | None:
    """Check, before a run, that its first checkpoint fits on the disk.

    Args:
        root: Where it saves.
        size: Bytes of a full checkpoint.
        config: When it saves, and how many it keeps.
        last_step: Of the run.

    Returns:
        A warning where not all checkpoints that the run will keep fit; None on remote storage.

    Raises:
        CheckpointError: not even one does.
    """
    free = folders.free_bytes(root)
    if free is None:
        return None
    if free < size:
        raise CheckpointError(
            f"the disk of {root} has no room for a checkpoint\n"
            f"  it needs {size:,} bytes, {free:,} are free there\n"
            "  make room, choose another job.dump_folder, or set checkpoint.load_only"
        )
    most = (
        config.keep_latest_k + 1 if config.keep_latest_k else math.inf
    )  # one is written beside the kept ones
    coming = min(-(-last_step // config.interval), most) - len(folders.step_folders(root))
    if coming * size <= free:
        return None
    return (
        f"{root} has room for {free // size} more checkpoints of {size:,} bytes ({free:,} are free); "
        f"this run makes {coming}"
    )
