"""Reading tensors of a checkpoint into the shards of this run, however it is sharded.

torch.distributed.checkpoint's planner says which boxes of the saved tensors overlap this rank's shards;
safetensors reads those slices and nothing else. Nothing is unpickled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
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

from trainer.checkpoint.files import CheckpointError, open_regular
from trainer.checkpoint.manifest import Chunk, Manifest, TensorEntry
from trainer.checkpoint.writer import DTYPES

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@torch.no_grad()
def read_tensors(folder: Path, manifest: Manifest, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (tensors, or DTensors of any layout) in place from the entries of the same keys.

    Raises:
        CheckpointError: an entry is missing or has another shape, or a file does not hold what it should.
    """
    for key, target in targets.items():
        entry = manifest.tensors.get(key)
        if entry is None:
            raise CheckpointError(f"has no {key}")
        if entry.shape != tuple(target.shape):
            raise CheckpointError(f"has {key} of shape {list(entry.shape)}, here it is {list(target.shape)}")
    metadata = Metadata({key: _metadata(manifest.tensors[key]) for key in targets})
    by_file: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
    chunks = {(key, c.offsets): c for key in targets for c in manifest.tensors[key].chunks}
    for item in create_default_local_load_plan(dict(targets), metadata).items:
        offsets = item.storage_index.offset
        assert offsets is not None
        chunk = chunks[item.storage_index.fqn, tuple(offsets)]
        by_file[chunk.file].append((chunk, item))
    for name, wanted in by_file.items():
        open_regular(folder / name).close()  # no symlink
        try:
            with safe_open(str(folder / name), framework="pt") as file:
                for chunk, item in wanted:
                    _fill(_destination(targets[item.dest_index.fqn], item), _slice(file, chunk, item))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name}: {str(error).splitlines()[0]}") from None


def empty_like_entry(manifest: Manifest, key: str, device: torch.device | str = "cpu") -> Tensor:
    """A plain tensor of an entry's shape and dtype."""
    entry = manifest.tensors[key]
    return torch.zeros(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device=device)


def _metadata(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=TORCH_DTYPES[entry.dtype]),
        torch.Size(entry.shape),
        [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
    )


def _slice(file: Any, chunk: Chunk, item: ReadItem) -> Tensor:
    stored = file.get_slice(chunk.name)
    if tuple(stored.get_shape()) != chunk.shape:
        raise CheckpointError(f"{chunk.file}: {chunk.name} has shape {stored.get_shape()} in the file")
    if not chunk.shape:
        return file.get_tensor(chunk.name)
    bounds = zip(item.storage_offsets, item.lengths, strict=True)
    return stored[tuple(slice(start, start + length) for start, length in bounds)]


def _destination(target: Tensor, item: ReadItem) -> Tensor:
    local = target.to_local() if isinstance(target, DTensor) else target
    for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        local = local.narrow(dim, start, length)
    return local


def _fill(destination: Tensor, values: Tensor) -> None:
    destination.copy_(values)
