"""Reading tensors of a checkpoint into the shards of this run, however it is sharded.

torch.distributed.checkpoint's planner says which boxes of the saved tensors overlap this rank's shards;
the rows that hold them are read, and nothing else, from a disk or remote storage alike (the safetensors
package reads local files only). Nothing is unpickled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
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

from trainer.checkpoint.files import CheckpointError, read_ranges
from trainer.checkpoint.integrity import parse_json
from trainer.checkpoint.manifest import DTYPE_BYTES, MANIFEST_FILE, Chunk, Manifest, TensorEntry
from trainer.checkpoint.remote import Place
from trainer.checkpoint.writer import DTYPES

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_MOST_HEADER_BYTES = 10**8  # the safetensors package's own bound
_PIECE_BYTES = 64 * 2**20


@torch.no_grad()
def read_tensors(folder: Place, manifest: Manifest, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (tensors, or DTensors of any layout) in place from the entries of the same keys.

    Raises:
        CheckpointError: an entry is missing or has another shape, or a file does not hold what it should.
    """
    check_shapes(manifest, targets)
    metadata = Metadata({key: _metadata(manifest.tensors[key]) for key in targets})
    by_file: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
    chunks = {(key, c.offsets): c for key in targets for c in manifest.tensors[key].chunks}
    for item in create_default_local_load_plan(dict(targets), metadata).items:
        offsets = item.storage_index.offset
        assert offsets is not None
        chunk = chunks[item.storage_index.fqn, tuple(offsets)]
        by_file[chunk.file].append((chunk, item))
    for name, wanted in by_file.items():
        stored = read_header(folder / name)
        pieces = [piece for chunk, item in wanted for piece in _pieces(stored, manifest, chunk, item)]
        pieces.sort(key=lambda piece: piece.start)
        contents = read_ranges(folder / name, [(piece.start, piece.end) for piece in pieces])
        for piece, content in zip(pieces, contents, strict=True):
            _fill(targets[piece.item.dest_index.fqn], piece, content)


def check_shapes(manifest: Manifest, targets: Mapping[str, Tensor]) -> None:
    """Check that the checkpoint has every target, in its shape; nothing is read.

    Raises:
        CheckpointError: it has not.
    """
    for key, target in targets.items():
        entry = manifest.tensors.get(key)
        if entry is None:
            raise CheckpointError(f"has no {key}")
        if entry.shape != tuple(target.shape):
            raise CheckpointError(f"has {key} of shape {list(entry.shape)}, here it is {list(target.shape)}")


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


@dataclass(frozen=True)
class Stored:
    """Where a file has a tensor, in bytes from its beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Place) -> dict[str, Stored]:
    """The tensors of a safetensors file; nothing of what it says is believed before it fits.

    Raises:
        CheckpointError: it is not of that format.
    """
    (length,) = read_ranges(path, [(0, 8)])
    size = int.from_bytes(length, "little")
    if size > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{path.name}: is not a safetensors file")
    (text,) = read_ranges(path, [(8, 8 + size)])
    found = {}
    for name, entry in parse_json(path.name, text).items():
        try:
            start, end = entry["data_offsets"]
            shape, width = tuple(entry["shape"]), DTYPE_BYTES[entry["dtype"]]
            sizes = (start, end, *shape)
            if any(type(number) is not int or number < 0 for number in sizes):
                raise ValueError
            if end - start != math.prod(shape) * width:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path.name}: the entry of {name[:60]!r} is malformed") from None
        found[name] = Stored(entry["dtype"], shape, 8 + size + start, 8 + size + end)
    return found


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of a stored box, read at once, and what of them goes where."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    item: ReadItem
    first_row: int
    """Counted from the item's first."""


def _pieces(stored: Mapping[str, Stored], manifest: Manifest, chunk: Chunk, item: ReadItem) -> list[_Piece]:
    box = stored.get(chunk.name)
    if box is None or box.shape != chunk.shape or box.dtype != manifest.tensors[item.dest_index.fqn].dtype:
        raise CheckpointError(f"{chunk.file}: does not hold {chunk.name} as {MANIFEST_FILE} says")
    dtype = TORCH_DTYPES[box.dtype]
    if not box.shape:
        return [_Piece(box.start, box.end, (), dtype, item, 0)]
    row_bytes = math.prod(box.shape[1:]) * DTYPE_BYTES[box.dtype]
    first, rows = item.storage_offsets[0], item.lengths[0]
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    pieces = []
    for row in range(0, rows if math.prod(item.lengths) else 0, step):
        count = min(step, rows - row)
        start = box.start + (first + row) * row_bytes
        shape = (count, *box.shape[1:])
        pieces.append(_Piece(start, start + count * row_bytes, shape, dtype, item, row))
    return pieces


def _fill(target: Tensor, piece: _Piece, content: bytearray) -> None:
    values = torch.frombuffer(content, dtype=torch.uint8).view(piece.dtype).reshape(piece.shape)
    local = target.to_local() if isinstance(target, DTensor) else target
    item = piece.item
    bounds = zip(item.storage_offsets, item.dest_offsets, item.lengths, strict=True)
    for dim, (source, destination, length) in enumerate(bounds):
        if dim == 0:
            local = local.narrow(0, destination + piece.first_row, piece.shape[0])
        else:
            local, values = local.narrow(dim, destination, length), values.narrow(dim, source, length)
    local.copy_(values)
