"""Writing a checkpoint: each rank its share of the tensors as safetensors, rank 0 the rest.

    1 plan      every rank lists the boxes of tensors that it holds (torch.distributed.checkpoint's planner);
                rank 0 gives each box to one of the ranks that have it, the least loaded
    2 write     rank R writes rank-R.safetensors, computing its checksum on the way; fsync
    3 seal      rank 0 writes manifest.json, integrity.json and COMPLETE, each with fsync
    4 publish   one rename to step-N (on remote storage, COMPLETE was that already)

The writer of torch.distributed.checkpoint itself is not used: it keeps its metadata as a pickle, and its
safetensors form (HuggingFaceStorageWriter) writes no metadata for sharded tensors at all.

A safetensors file is 8 bytes of header length, the header as JSON, and the raw tensors; it is written here
piece by piece, so that one tensor at a time is in host memory and its checksum costs no second pass.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.tensor import DTensor

from trainer.checkpoint import folders
from trainer.checkpoint.files import (
    CheckpointError,
    NewFile,
    file_sizes,
    new_file,
    sync_folder,
    write_durably,
)
from trainer.checkpoint.integrity import BLOCK_BYTES, FileRecord, new_checksum, record_of, seal
from trainer.checkpoint.manifest import DTYPE_BYTES, MANIFEST_FILE, Chunk, Manifest, TensorEntry
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.remote import Place

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""dtype -> its name in safetensors."""
MARGIN_BYTES = 2**20
"""Free space asked for beyond the tensors, for the JSON files."""
_BLOCKS_BEHIND = 8


@dataclass(frozen=True)
class Box:
    """A part of a tensor that a rank holds."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """What its file calls it."""
        return f"{self.key}@{','.join(map(str, self.offsets))}"

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Plan = Sequence[Sequence[Box]]
"""What each rank writes."""


def boxes_held(tensors: Mapping[str, Tensor], export_dtype: torch.dtype | None) -> list[Box]:
    """The boxes of `tensors` that this rank holds, replicated ones included."""
    found = []
    # is_coordinator decides about objects that are no tensors; there are none.
    for item in create_default_local_save_plan(dict(tensors), is_coordinator=False).items:
        data = item.tensor_data
        assert data is not None, item.index.fqn
        dtype = DTYPES[stored_dtype(data.properties.dtype, export_dtype)]
        offsets, shape = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        if math.prod(shape) > 0:  # a rank may hold nothing of a small tensor
            found.append(Box(item.index.fqn, offsets, shape, tuple(data.size), dtype))
    return found


def stored_dtype(dtype: torch.dtype, export_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in the file: the tensor's own, unless floats are exported as another."""
    return export_dtype if export_dtype is not None and dtype.is_floating_point else dtype


def assign(held: Sequence[Sequence[Box]]) -> Plan:
    """Give each box to the least loaded of the ranks that hold it; a pure function of `held`."""
    holders: dict[Box, list[int]] = defaultdict(list)
    for rank, boxes in enumerate(held):
        for box in boxes:
            holders[box].append(rank)
    load = [0] * len(held)
    plan: list[list[Box]] = [[] for _ in held]
    for box, ranks in holders.items():
        rank = min(ranks, key=lambda r: (load[r], r))
        load[rank] += box.nbytes
        plan[rank].append(box)
    return plan


def make_plan(tensors: Mapping[str, Tensor], export_dtype: torch.dtype | None, ranks: Ranks) -> Plan:
    """Who writes what; the same on every rank."""
    return assign(ranks.gather(boxes_held(tensors, export_dtype)))


def local_data(tensors: Mapping[str, Tensor], box: Box) -> Tensor:
    """The elements of a box that this rank holds; on their device, sharing memory."""
    tensor = tensors[box.key].detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    assert tuple(local.shape) == box.shape, (box, tuple(local.shape))
    return local


def to_host(tensor: Tensor, box: Box) -> Tensor:
    """As it goes to the file: contiguous, on the host, in the stored dtype."""
    dtype = next(dtype for dtype, name in DTYPES.items() if name == box.dtype)
    return tensor.to("cpu", dtype).contiguous()


def write_checkpoint(
    target: Place, plan: Plan, host_tensor: Callable[[Box], Tensor], manifest: Manifest, ranks: Ranks
) -> int:
    """Write and publish a checkpoint; all ranks call it.

    Args:
        target: The folder ``step-N`` that it becomes.
        plan: Of `make_plan`.
        host_tensor: Gives the elements of one of this rank's boxes, on the host.
        manifest: Everything but its tensors.
        ranks: All of them.

    Returns:
        Bytes written by all ranks.

    Raises:
        CheckpointError: it could not be written; nothing of it is left, and what was at `target` is there.
    """
    needed = sum(box.nbytes for boxes in plan for box in boxes) + MARGIN_BYTES
    temporary: Place | None = None
    try:
        temporary = ranks.first_does(partial(_begin, target, needed))
        mine = temporary / _file_name(ranks.rank)
        records = ranks.all_do(lambda: write_tensors(mine, plan[ranks.rank], host_tensor))
        written = {_file_name(rank): record for rank, record in enumerate(records) if record is not None}
        entries = _entries(plan)
        ranks.first_does(partial(_finish, temporary, target, replace(manifest, tensors=entries), written))
    except CheckpointError as error:
        if temporary is not None:
            with suppress(CheckpointError):  # storage that fails a save may fail this too
                ranks.first_does(partial(folders.remove, temporary))
        raise CheckpointError(f"{target} was not saved: {error}{_space(target.parent, needed)}") from None
    return sum(record.size for record in written.values())


def write_tensors(
    path: Place, boxes: Sequence[Box], host_tensor: Callable[[Box], Tensor]
) -> FileRecord | None:
    """Write one safetensors file and wait until it is on disk; None where there is nothing to write."""
    if not boxes:
        return None
    # Wide elements first, so that every tensor is aligned in the file.
    boxes = sorted(boxes, key=lambda box: -DTYPE_BYTES[box.dtype])
    with new_file(path) as file:
        return _write_blocks(file, _blocks(boxes, host_tensor))


def _blocks(boxes: Sequence[Box], host_tensor: Callable[[Box], Tensor]) -> Iterator[memoryview]:
    header, position = {}, 0
    for box in boxes:
        end = position + box.nbytes
        header[box.name] = {"dtype": box.dtype, "shape": box.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for box in boxes:
        data = memoryview(host_tensor(box).reshape(-1).view(torch.uint8).numpy())
        assert len(data) == box.nbytes, box
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]


def _write_blocks(file: NewFile, blocks: Iterable[memoryview]) -> FileRecord:
    """Write blocks while another thread computes their checksum: both leave Python's lock.

    The checksum may fall `_BLOCKS_BEHIND` blocks behind, so that a busy moment of either costs no time.
    """
    size, checksum, under_way = 0, new_checksum(), deque[Future[None]]()
    with ThreadPoolExecutor(1) as side:
        for block in blocks:
            under_way.append(side.submit(checksum.update, block))
            file.write(block)
            size += len(block)
            if len(under_way) > _BLOCKS_BEHIND:
                under_way.popleft().result()
        for rest in under_way:
            rest.result()
    return FileRecord(size, checksum.hexdigest())


def _begin(target: Place, needed: int) -> Place:
    temporary = folders.new_temporary(target.parent, folders.step_of(target.name) or 0)
    free = folders.free_bytes(target.parent)
    if free is not None and free < needed:
        folders.remove(temporary)
        raise CheckpointError("the disk is full")
    return temporary


def _finish(temporary: Place, target: Place, manifest: Manifest, written: Mapping[str, FileRecord]) -> None:
    for name, size in file_sizes(temporary, written).items():
        if size != written[name].size:
            raise CheckpointError(f"{name} has {size:,} bytes, {written[name].size:,} were written")
    content = manifest.to_bytes()
    write_durably(temporary / MANIFEST_FILE, content)
    seal(temporary, {**written, MANIFEST_FILE: record_of(content)})
    sync_folder(temporary)
    folders.publish(temporary, target)


def _entries(plan: Plan) -> dict[str, TensorEntry]:
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for rank, boxes in enumerate(plan):
        for box in boxes:
            chunks[box.key].append(Chunk(box.offsets, box.shape, _file_name(rank), box.name))
            kinds[box.key] = (box.dtype, box.tensor_shape)
    return {key: TensorEntry(*kinds[key], tuple(found)) for key, found in chunks.items()}


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _space(root: Place, needed: int) -> str:
    """What a full disk lacks; the message's second line."""
    free = folders.free_bytes(root)
    if free is None:
        return "\n  former checkpoints are as they were"
    return f"\n  it needs {needed:,} bytes, {free:,} are free there; former checkpoints are as they were"
