"""Write one shard of token files: see `trainer.data.token_manifest` for the layout.

A shard appears whole or not at all: its files are written under other names, flushed to the disk and then
renamed.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.token_manifest import BLOCK_BYTES

_WRITE_BYTES = 1 << 20


class ShardWriter:
    """Collects documents into one shard.

    Args:
        folder: Where the shard will lie.
        name: ``shard-00000``.
        dtype: ``uint16`` or ``uint32``.
        scratch: Folder of the same file system for unfinished files.
    """

    def __init__(self, folder: Path, name: str, dtype: str, scratch: Path) -> None:
        self._target = folder / name
        self._scratch = scratch / f"{folder.name}-{name}.{os.getpid()}.tmp"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = self._scratch.open("wb")
        self._digest = hashlib.sha256()
        self._checksums = array("I")
        self._buffer = bytearray()
        self._offsets = array("Q")
        self.continues = False
        self.tokens = 0
        self.largest_id = 0

    @property
    def documents(self) -> int:
        """Documents so far, a cut one counted."""
        return len(self._offsets)

    def add(self, ids: np.ndarray, opens: bool = True) -> None:
        """Append a document, or with ``opens`` false, go on with the one before."""
        if len(ids) == 0:
            return
        if opens or not self._offsets:
            self.continues = self.continues or (not opens and not self._offsets)
            self._offsets.append(self.tokens)
        self.tokens += len(ids)
        self.largest_id = max(self.largest_id, int(ids.max()))
        self._buffer += ids.astype(self._dtype).tobytes()
        if len(self._buffer) >= _WRITE_BYTES:
            self._flush(len(self._buffer) // BLOCK_BYTES * BLOCK_BYTES)

    def finish(self) -> dict[str, Any] | None:
        """Put the shard in its place; its facts for the index, or None where it holds nothing."""
        self._flush(len(self._buffer))
        _close(self._file)
        if self.tokens == 0:
            self._scratch.unlink()
            return None
        index = np.array([*self._offsets, self.tokens], dtype="<u8").tobytes()
        index += np.array(self._checksums, dtype="<u4").tobytes()
        index_scratch = self._scratch.with_suffix(".idx.tmp")
        with index_scratch.open("wb") as file:
            file.write(index)
            _close(file)
        os.replace(self._scratch, f"{self._target}.bin")
        os.replace(index_scratch, f"{self._target}.idx")
        return {
            "name": self._target.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "continues": self.continues,
            "largest_id": self.largest_id,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": hashlib.sha256(index).hexdigest(),
        }

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._scratch.unlink(missing_ok=True)

    def _flush(self, size: int) -> None:
        """Write the buffer's first ``size`` bytes, whole blocks but at the end."""
        data = memoryview(self._buffer)[:size]
        for start in range(0, size, BLOCK_BYTES):
            self._checksums.append(zlib.crc32(data[start : start + BLOCK_BYTES]))
        self._digest.update(data)
        self._file.write(data)
        data.release()
        del self._buffer[:size]


def _close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
