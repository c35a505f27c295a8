"""Export to Hugging Face's format, from a checkpoint or out of a run; and import from it.

All read and write one tensor at a time: the largest tensor is what they need of memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models import MODELS
from trainer.checkpoint import folders
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.manifest import MODEL_ONLY, Manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.reader import TORCH_DTYPES
from trainer.checkpoint.writer import Box, write_checkpoint
from trainer.config.derived import model_config
from trainer.config.job import JobConfig
from trainer.data.paths import resolve_path
from trainer.data.tokenizer import find_tokenizer_file
from trainer.interop.hf_folder import HfFolder, open_hf_folder, require_same_model
from trainer.interop.hf_read import read_hf, read_whole
from trainer.interop.hf_write import (
    LARGEST_FILE_BYTES,
    HfEntry,
    HfWriter,
    entries_of,
    main_dtype,
    model_files,
)
from trainer.interop.trained import HF_SUFFIX, TrainedModel, tokenizer_path

log = logging.getLogger(__name__)

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""A user's word for a dtype -> its name in safetensors."""


def export_hf(
    trained: TrainedModel,
    out: Path,
    dtype: str | None = None,
    tokenizer: str | None = None,
    largest_file_bytes: int = LARGEST_FILE_BYTES,
) -> int:
    """Write a Hugging Face folder.

    Args:
        trained: What to export.
        out: The folder to make; if it is there it must be empty.
        dtype: float32, bfloat16 or float16; None for the dtypes as stored.
        tokenizer: Its file or folder, where it is not where the run had it.
        largest_file_bytes: See `HfWriter`.

    Returns:
        Bytes of all weights.

    Raises:
        ValueError: the model has no such form, or its tokenizer cannot be read.
        CheckpointError: a file cannot be read or written.
    """
    fmt = trained.spec.huggingface
    if fmt is None:
        raise ValueError(f"{trained.model_name} has no Hugging Face format")
    stored = fmt.names(trained.config)
    if lacking := [fqn for fqn in stored if fqn not in trained.dtypes]:
        raise CheckpointError(f"{trained.path}: has no {lacking[0]}")
    dtypes = {fqn: trained.dtypes[fqn] if dtype is None else DTYPE_NAMES[dtype] for fqn in stored}
    entries = entries_of(fmt, trained.config, dtypes)
    others = model_files(fmt, trained.config, main_dtype(entries), tokenizer_path(trained, tokenizer))
    writer = HfWriter(out, entries, largest_file_bytes)
    try:
        for entry in entries:
            writer.add(entry, _there(trained.model_name, trained.config, entry, trained.whole(entry.fqn)))
        return writer.finish(others)
    except OSError as error:
        raise CheckpointError(f"{out} was not written: {error.strerror}") from None
    finally:
        writer.abandon()


def import_hf(source: Path, out: Path, flavor: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Turn a Hugging Face folder into a checkpoint, ``out/step-0``, as stored.

    Args:
        source: The folder.
        out: Folder of checkpoints; it has no step 0 yet.
        flavor: The flavor that it must be; None finds one.

    Returns:
        The checkpoint, and the settings with which a run trains this model.

    Raises:
        ValueError: no such flavor, or `out` has a step 0.
        CheckpointError: the folder is not valid, or of another flavor; or nothing could be written.
    """
    folder = open_hf_folder(source)
    settings = model_settings(folder, flavor)
    target = folders.step_folder(out, 0)
    assert isinstance(target, Path)  # as `out` is
    if target.exists():
        raise ValueError(f"{target} is there already; choose another folder")
    tensors = folder.tensors.items()
    boxes = [Box(f"model.{fqn}", (0,) * len(t.shape), t.shape, t.shape, t.dtype) for fqn, t in tensors]
    recorded = {**settings, "model.overrides.max_seq_len": folder.config.max_seq_len}
    manifest = Manifest(0, MODEL_ONLY, {"step": 0, "tokens_seen": 0, "world_size": 1}, config=recorded)

    def host_tensor(box: Box) -> Tensor:
        return read_whole(folder, box.key.removeprefix("model."))

    write_checkpoint(target, [boxes], host_tensor, manifest, Ranks())
    return target, settings


def model_settings(folder: HfFolder, flavor: str | None = None) -> dict[str, Any]:
    """The [model] settings that build the model of a folder: the flavor with the fewest overrides.

    Raises:
        ValueError: no flavor has the name `flavor`.
        CheckpointError: the folder is of another flavor.
    """
    flavors = folder.spec.flavors
    if flavor is not None:
        if flavor not in flavors:
            raise ValueError(f"no flavor {flavor!r} of {folder.model_name}; it has {', '.join(flavors)}")
        require_same_model(folder, folder.model_name, flavors[flavor])
    overrides = folder.format.overrides
    choices = {name: overrides(folder.config, flavors[name]) for name in ([flavor] if flavor else flavors)}
    chosen = min(choices, key=lambda name: len(choices[name]))
    settings: dict[str, Any] = {"model.name": folder.model_name, "model.flavor": chosen}
    try:
        find_tokenizer_file(str(folder.path))
        settings["model.hf_assets_path"] = str(folder.path.resolve())
    except ValueError:
        pass
    return {**settings, **{f"model.overrides.{key}": value for key, value in choices[chosen].items()}}


def open_for_run(config: JobConfig) -> HfFolder:
    """The folder that a run starts from (``checkpoint.initial_load_in_hf``), checked against its model.

    Raises:
        CheckpointError: it is not valid or of another model.
    """
    path = config.checkpoint.initial_load_path or config.model.hf_assets_path
    folder = open_hf_folder(resolve_path(path) or Path(path).expanduser())
    require_same_model(folder, config.model.name, model_config(config))
    return folder


def load_in_run(folder: HfFolder, targets: Mapping[str, Tensor]) -> None:
    """Fill a run's parameters, each rank its shards; FQN -> tensor."""
    if extra := [fqn for fqn in targets if fqn not in folder.tensors]:
        raise CheckpointError(f"{folder.path}: has no {extra[0]}")
    read_hf(folder, targets)


def save_in_run(
    config: JobConfig, root: Path, step: int, tensors: Mapping[str, Tensor], ranks: Ranks
) -> Path:
    """Write a run's parameters as ``root/step-N-hf`` (``checkpoint.last_save_in_hf``); all ranks call it.

    Tensors are gathered one at a time, where they are, and rank 0 writes; the others wait for each, so that
    none runs ahead of a slow disk into a collective's timeout.

    Args:
        config: The run's.
        root: Its folder of checkpoints.
        step: The last one.
        tensors: FQN -> parameter, sharded as it may be; of this rank's pipeline stages.
        ranks: All of them.

    Raises:
        CheckpointError: on every rank; nothing is left behind.
    """
    name, sizes = config.model.name, model_config(config)
    dtype = DTYPE_NAMES[config.checkpoint.export_dtype]
    fmt = MODELS[name].huggingface
    assert fmt is not None  # checked with the configuration
    target = root / f"step-{step}{HF_SUFFIX}"
    entries = entries_of(fmt, sizes, dict.fromkeys(fmt.names(sizes), dtype))
    writers: list[HfWriter] = []

    def begin() -> None:
        for left in root.glob(f"{target.name}.tmp-????????"):  # of a run that was killed here
            folders.remove(left)
        writers.append(HfWriter(target, entries, replace=True))

    def add(entry: HfEntry, whole: Tensor | None) -> None:
        assert whole is not None, entry.name
        writers[0].add(entry, _there(name, sizes, entry, whole))

    def finish() -> None:
        try:
            tokenizer = find_tokenizer_file(config.model.hf_assets_path)
            others = model_files(fmt, sizes, dtype, tokenizer)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        writers[0].finish(others)

    held = ranks.gather({fqn: tensor.dtype for fqn, tensor in tensors.items()})
    try:
        ranks.first_does(begin)
        for entry in entries:
            holder = next(rank for rank, names in enumerate(held) if entry.fqn in names)
            whole = _whole(tensors, entry, holder, held[holder][entry.fqn], ranks.rank)
            ranks.first_does(partial(add, entry, whole))
        ranks.first_does(finish)
    except CheckpointError as error:
        raise CheckpointError(f"{target} was not saved: {error}") from None
    finally:
        for writer in writers:
            writer.abandon()
    return target


def _whole(
    tensors: Mapping[str, Tensor], entry: HfEntry, holder: int, dtype: torch.dtype, rank: int
) -> Tensor | None:
    """A tensor, whole, on rank 0; `holder` is the first rank whose stages have it."""
    whole = tensors[entry.fqn].detach() if entry.fqn in tensors else None
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()  # by the ranks of its stage
    if holder == 0:
        return whole
    if rank == holder:
        assert whole is not None
        dist.send(whole.contiguous(), dst=0)
    if rank == 0:
        whole = torch.empty(entry.shape, dtype=dtype, device=next(iter(tensors.values())).device)
        dist.recv(whole, src=holder)
    return whole


def _there(model_name: str, config: Any, entry: HfEntry, tensor: Tensor) -> Tensor:
    """A tensor in Hugging Face's row order and the dtype of its entry."""
    fmt = MODELS[model_name].huggingface
    assert fmt is not None
    mapped = fmt.to_hf(config, entry.fqn, tensor.to(TORCH_DTYPES[entry.dtype]))
    assert mapped is not None, entry.fqn
    return mapped[1]
