"""The manifest: what a checkpoint holds, as strictly checked JSON. Torch-free.

    {"format": "octavo-checkpoint", "version": 1, "step": 500, "content": "full",
     "train_state": {"step": 500, "tokens_seen": 4096000, "seed": 1, "world_size": 8},
     "lr_scheduler": {"step": 500},            steps that the schedule took
     "dataloader": {...},                      position in the token stream, see trainer.data.loader
     "model": {"rope_theta": 500000.0, ...},   settings in effect that decide what the weights compute
     "config": {"optimizer.lr": 0.0008, ...},  every setting of the run that saved it
     "tensors": {"model.tok_embeddings.weight": {
         "dtype": "F32", "shape": [2048, 256],
         "chunks": [{"offsets": [0, 0], "shape": [1024, 256],
                     "file": "rank-00000.safetensors", "name": "model.tok_embeddings.weight@0,0"}, ...]}}}

Keys of tensors: ``model.<FQN>``, ``optimizer.<FQN>.<field>``, ``converter.<name>.<key>``;
in older ones also ``rng.<rank>.<device>``, which is not read. FQNs carry no wrapper prefixes. The chunks of a
tensor are boxes that cover it once; how they are cut says how the run that saved was sharded, and nothing
about the run that loads.

Reading trusts nothing: types, names, bounds and coverage are checked before a byte of a tensor is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.checkpoint.files import FILE_NAME, CheckpointError, read_regular
from trainer.checkpoint.folders import step_of
from trainer.checkpoint.integrity import FileRecord, parse_json, read_records, verify_files
from trainer.checkpoint.remote import Place

MANIFEST_FILE = "manifest.json"
VERSION = 1
FULL, MODEL_ONLY = "full", "model"
_DTYPES_BY_BYTES = {
    8: ("F64", "I64"),
    4: ("F32", "I32"),
    2: ("F16", "BF16", "I16"),
    1: ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
}
DTYPE_BYTES = {name: size for size, names in _DTYPES_BY_BYTES.items() for name in names}
"""Names of dtypes in safetensors -> bytes an element."""
_FORMAT = "octavo-checkpoint"
_KEY = re.compile(r"(model|optimizer|converter|rng)\.[A-Za-z0-9_.\-]{1,400}")
_SECTIONS = ("train_state", "lr_scheduler", "dataloader", "config", "model")


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it is stored."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    name: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """See the module."""

    step: int
    content: str
    """``full``, or ``model``: parameters only, which no run can be continued from exactly."""
    train_state: dict[str, Any] = field(default_factory=dict)
    lr_scheduler: dict[str, Any] = field(default_factory=dict)
    dataloader: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, TensorEntry]:
        """Tensors whose key begins with ``prefix.``, by the rest of the key."""
        start = f"{prefix}."
        return {key[len(start) :]: entry for key, entry in self.tensors.items() if key.startswith(start)}

    def to_bytes(self) -> bytes:
        """As JSON."""
        document = {"format": _FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(document, indent=1, default=str).encode() + b"\n"


def read_manifest(folder: Place) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, malformed, or of a later version.
    """
    parsed = parse_json(MANIFEST_FILE, read_regular(folder / MANIFEST_FILE))
    if parsed.get("format") != _FORMAT:
        raise CheckpointError(f"{MANIFEST_FILE}: is not of an Octavo checkpoint")
    if parsed.get("version") != VERSION:
        raise CheckpointError(f"{MANIFEST_FILE}: has version {parsed.get('version')!r}, this is {VERSION}")
    if not _is_size(parsed.get("step")) or parsed.get("content") not in (FULL, MODEL_ONLY):
        raise CheckpointError(f"{MANIFEST_FILE}: step or content is malformed")
    parsed.setdefault("model", {})
    if not all(isinstance(parsed.get(name), dict) for name in (*_SECTIONS, "tensors")):
        raise CheckpointError(f"{MANIFEST_FILE}: a section is missing")
    state = parsed["train_state"]
    counts = [state.get(name, 0) for name in ("step", "tokens_seen", "seed", "world_size")]
    if not all(_is_size(count) for count in [*counts, parsed["lr_scheduler"].get("step", 0)]):
        raise CheckpointError(f"{MANIFEST_FILE}: a count is not a number")
    tensors = {key: _entry(key, raw) for key, raw in parsed["tensors"].items()}
    sections = {name: parsed[name] for name in _SECTIONS}
    return Manifest(parsed["step"], parsed["content"], tensors=tensors, **sections)


def open_checkpoint(folder: Place) -> tuple[dict[str, FileRecord], Manifest]:
    """Records and manifest of a complete checkpoint; the tensors' files are not read.

    Raises:
        CheckpointError: it is not complete, or its parts do not fit each other.
    """
    records = read_records(folder)
    verify_files(folder, records, [MANIFEST_FILE] if MANIFEST_FILE in records else [])
    manifest = read_manifest(folder)
    stored = sum(record.size for record in records.values())
    for key, entry in manifest.tensors.items():
        unknown = [chunk.file for chunk in entry.chunks if chunk.file not in records]
        if unknown or entry.nbytes > stored:
            raise CheckpointError(f"{MANIFEST_FILE}: {key} is not in the checkpoint's files")
    if manifest.step != step_of(folder.name):
        raise CheckpointError(f"{MANIFEST_FILE}: is of step {manifest.step}")
    return records, manifest


def _entry(key: str, raw: Any) -> TensorEntry:
    try:
        chunks = tuple(
            Chunk(_sizes(c["offsets"]), _sizes(c["shape"]), str(c["file"]), str(c["name"]))
            for c in raw["chunks"]
        )
        entry = TensorEntry(str(raw["dtype"]), _sizes(raw["shape"]), chunks)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{MANIFEST_FILE}: the entry of {key[:60]!r} is malformed") from None
    fits = (
        _KEY.fullmatch(key)
        and entry.dtype in DTYPE_BYTES
        and all(FILE_NAME.fullmatch(chunk.file) and len(chunk.name) < 600 for chunk in chunks)
        and all(_inside(chunk, entry.shape) for chunk in chunks)
        and sum(math.prod(chunk.shape) for chunk in chunks) == math.prod(entry.shape)
        and len({chunk.offsets for chunk in chunks}) == len(chunks)
    )
    if not fits:
        raise CheckpointError(f"{MANIFEST_FILE}: the entry of {key[:60]!r} does not hold together")
    return entry


def _inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.shape) == len(shape):
        return False
    ends = (offset + size for offset, size in zip(chunk.offsets, chunk.shape, strict=True))
    return all(end <= limit for end, limit in zip(ends, shape, strict=True))


def _sizes(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) > 8 or not all(_is_size(size) for size in raw):
        raise ValueError
    return tuple(raw)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62
