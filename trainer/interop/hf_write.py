"""Writing a Hugging Face folder: sharded safetensors with an index, config.json, tokenizer files.

Tensors come one at a time and go straight to their file, so that one of them is in memory. Which file holds
what is a pure function of names, shapes and dtypes: equal weights give equal bytes.

The folder is written beside its place as ``NAME.tmp-...`` and appears by one rename, whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.spec import HuggingFaceFormat
from trainer.checkpoint import files, folders
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.manifest import DTYPE_BYTES
from trainer.checkpoint.reader import TORCH_DTYPES
from trainer.data.tokenizer import build_tokenizer
from trainer.interop.hf_folder import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE
from trainer.interop.hf_tokenizer import tokenizer_files

LARGEST_FILE_BYTES = 5 * 10**9
"""As transformers' own default."""
_MARGIN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HfEntry:
    """One tensor of the folder."""

    fqn: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def entries_of(fmt: HuggingFaceFormat, config: Any, dtypes: Mapping[str, str]) -> list[HfEntry]:
    """What a model's folder holds, in order; `dtypes` maps FQNs to safetensors' names of dtypes."""
    shapes = fmt.shapes(config)
    return [HfEntry(fqn, name, dtypes[fqn], shapes[fqn]) for fqn, name in fmt.names(config).items()]


class HfWriter:
    """Writes one folder: `add` for each entry in order, then `finish`; or `abandon`.

    Args:
        target: Becomes the folder; if it is there it must be empty, unless `replace`.
        entries: Of `entries_of`.
        largest_file_bytes: A file ends before the tensor that would make it larger.
        replace: Put the new folder in the place of one that is there.

    Raises:
        CheckpointError: there is no room, or something is in the way.
    """

    def __init__(
        self,
        target: Path,
        entries: Sequence[HfEntry],
        largest_file_bytes: int = LARGEST_FILE_BYTES,
        *,
        replace: bool = False,
    ) -> None:
        self._target, self._replace = target, replace
        if os.path.lexists(target) and not replace and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target} is there already and not empty; choose another folder")
        self._shards = _shards(entries, largest_file_bytes)
        self._first = {shard[0].name: number for number, shard in enumerate(self._shards)}
        self._file: BinaryIO | None = None
        target.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(entry.nbytes for entry in entries) + _MARGIN_BYTES
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise CheckpointError(f"{target} needs {needed:,} bytes, {free:,} are free there")
        self._folder = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        self._folder.mkdir()

    def add(self, entry: HfEntry, tensor: Tensor) -> None:
        """Write the next tensor, given in Hugging Face's row order."""
        if entry.name in self._first:
            self._end_file()
            number = self._first[entry.name]
            self._file = (self._folder / _file_name(number, len(self._shards))).open("xb")
            self._file.write(_header(self._shards[number]))
        assert self._file is not None, entry.name
        assert tuple(tensor.shape) == entry.shape, (entry, tuple(tensor.shape))
        host = tensor.detach().to("cpu", TORCH_DTYPES[entry.dtype]).contiguous()
        self._file.write(memoryview(host.reshape(-1).view(torch.uint8).numpy()))

    def finish(self, others: Mapping[str, bytes]) -> int:
        """Write the index and `others` (name -> content), and put the folder in its place.

        Returns:
            Bytes of all weights.
        """
        self._end_file()
        total = sum(entry.nbytes for shard in self._shards for entry in shard)
        count = len(self._shards)
        if count > 1:
            weight_map = {e.name: _file_name(n, count) for n, shard in enumerate(self._shards) for e in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            files.write_durably(self._folder / INDEX_FILE, as_json(index))
        for name, content in others.items():
            files.write_durably(self._folder / name, content)
        files.sync_folder(self._folder)
        if self._replace:
            folders.publish(self._folder, self._target)
        else:
            os.rename(self._folder, self._target)
            files.sync_folder(self._target.parent)
        return total

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._file is not None:
            self._file.close()
            self._file = None
        folders.remove(self._folder)

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def model_files(fmt: HuggingFaceFormat, config: Any, dtype: str, tokenizer: Path | None) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files, by name.

    Args:
        fmt: The model's.
        config: Its sizes.
        dtype: Of the weights, by its safetensors name.
        tokenizer: Its file or folder; None where the model has none.

    Raises:
        ValueError: the tokenizer cannot be read.
    """
    settings = fmt.config(config)
    # transformers 5 calls it dtype and still reads the older name, which everything else knows too.
    settings["torch_dtype"] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    generation: dict[str, Any] = {}
    others: dict[str, bytes] = {}
    if tokenizer is not None:
        loaded = build_tokenizer(tokenizer)
        ids = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id}
        settings.update(ids)
        generation.update(ids)
        others = tokenizer_files(tokenizer)
    return {CONFIG_FILE: as_json(settings), GENERATION_FILE: as_json(generation), **others}


def main_dtype(entries: Sequence[HfEntry]) -> str:
    """The dtype that most elements have."""
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry.dtype] += math.prod(entry.shape)
    return counts.most_common(1)[0][0]


def as_json(value: Any) -> bytes:
    """As Hugging Face writes its files."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _shards(entries: Sequence[HfEntry], largest: int) -> list[list[HfEntry]]:
    shards: list[list[HfEntry]] = []
    size = largest
    for entry in entries:
        if size + entry.nbytes > largest or not shards:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _file_name(number: int, count: int) -> str:
    return WEIGHTS_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(shard: Sequence[HfEntry]) -> bytes:
    # transformers refuses files whose metadata does not name a framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in shard:
        end = position + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
