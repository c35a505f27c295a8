"""Tensors of a Hugging Face folder into the shards of this run, slice by slice.

torch.distributed.checkpoint's planner says which box of each tensor this rank holds; only those rows and
columns are read from the (memory-mapped) file, so no rank ever has a whole copy of a model that is sharded.
Rows of wq and wk change places within a head, so of these whole heads are read and cut afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.reader import TORCH_DTYPES
from trainer.interop.hf_folder import HfFolder, HfTensor


@torch.no_grad()
def read_hf(folder: HfFolder, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (FQN -> tensor, or DTensor of any layout) in place, cast to their dtypes.

    Raises:
        CheckpointError: the folder has no such tensor, of another shape, or a file cannot be read.
    """
    for fqn, target in targets.items():
        stored = folder.tensors.get(fqn)
        if stored is None or stored.shape != tuple(target.shape):
            there = "is not there" if stored is None else f"has shape {list(stored.shape)}"
            raise CheckpointError(f"{folder.path}: {fqn} {there}, here it is {list(target.shape)}")
    metadata = Metadata({fqn: _metadata(folder.tensors[fqn]) for fqn in targets})
    by_file: dict[str, list[ReadItem]] = defaultdict(list)
    for item in create_default_local_load_plan(dict(targets), metadata).items:
        by_file[folder.tensors[item.dest_index.fqn].file].append(item)
    for name, items in by_file.items():
        try:
            with safe_open(str(folder.path / name), framework="pt") as file:
                for item in items:
                    fqn = item.dest_index.fqn
                    start, lengths = tuple(item.storage_offsets), tuple(item.lengths)
                    _place(targets[fqn], item).copy_(_read_box(folder, file, fqn, start, lengths))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder.path / name}: {str(error).splitlines()[0]}") from None


def read_whole(folder: HfFolder, fqn: str) -> Tensor:
    """One tensor, whole, in its stored dtype and Octavo's row order; on the host."""
    stored = folder.tensors[fqn]
    tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    read_hf(folder, {fqn: tensor})
    return tensor


def _read_box(
    folder: HfFolder, file: Any, fqn: str, start: tuple[int, ...], lengths: tuple[int, ...]
) -> Tensor:
    """Rows and columns of a tensor in Octavo's order."""
    stored = folder.tensors[fqn]
    block = folder.format.row_block(folder.config, fqn)
    first = start[0] // block * block
    last = -(-(start[0] + lengths[0]) // block) * block
    columns = [slice(begin, begin + length) for begin, length in zip(start[1:], lengths[1:], strict=True)]
    rows = file.get_slice(stored.name)[(slice(first, last), *columns)]
    mapped = folder.format.from_hf(folder.config, stored.name, rows)
    assert mapped is not None, stored.name
    return mapped[1][start[0] - first :][: lengths[0]]


def _place(target: Tensor, item: ReadItem) -> Tensor:
    local = target.to_local() if isinstance(target, DTensor) else target
    for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        local = local.narrow(dim, start, length)
    return local


def _metadata(stored: HfTensor) -> TensorStorageMetadata:
    shape = torch.Size(stored.shape)
    chunks = [ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)]
    return TensorStorageMetadata(TensorProperties(dtype=TORCH_DTYPES[stored.dtype]), shape, chunks)
