"""Token files as windows of a shuffled stream, memory-mapped: any window at once.

The stream is all documents in the order in which they are stored, each ``[bos] + tokens + [eos]``, cut in
W windows of S + 1 tokens with stride S (`trainer.data.packing` tells why no token is lost). In epoch e the
windows come in a permutation of 0 ... W - 1 drawn from (seed, e): a global shuffle that holds nothing in
memory. Window n of the run is element n mod W of epoch n // W, so a place in the stream is one integer
and resuming seeks in O(1). A finite pass (validation) reads the windows in their order.

What is read is verified: the first time a process touches a 64 KiB block of a shard, its CRC-32 is
compared with the .idx, and the .idx was compared with the index's SHA-256. A changed shard is refused with
its name and place before a token of it is trained on.

Shapes: S = seq_len, T = tokens of the stream with bos and eos.
"""

from __future__ import annotations

import bisect
import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.packing import window_arrays
from trainer.data.permutation import Permutation
from trainer.data.token_manifest import BLOCK_BYTES, ITEM_BYTES, ShardEntry, TokenManifest, read_manifest

_OPEN_SHARDS = 128
_VERIFIED_WHOLE_BYTES = 1 << 28
_VERIFIED: set[tuple[object, ...]] = set()


class TokenWindow(NamedTuple):
    """Window ``number`` of the run: read when its arrays are asked for, so passing it by costs nothing."""

    files: TokenFiles
    number: int

    def arrays(self, seq_len: int, padding_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and document ids, (S,) each."""
        return window_arrays(self.files.pieces(self.number), seq_len, padding_id)


class TokenFiles:
    """The windows of a folder of token files.

    Args:
        path: The folder.
        seq_len: S.
        seed: Of the order; None reads the windows in their order.
        bos: Ids put before every document.
        eos: Ids put after every document.

    Raises:
        ValueError: A file is missing, malformed or changed; an .idx does not fit its checksum; there are
            fewer than two tokens.
    """

    def __init__(self, path: str, seq_len: int, seed: int | None, bos: list[int], eos: list[int]) -> None:
        self.manifest = read_manifest(path)
        self._seq_len, self._seed = seq_len, seed
        self._bos, self._eos = (np.array(ids, dtype=np.int64) for ids in (bos, eos))
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._verified: dict[int, bytearray] = {}  # one byte a block; outlives the mapping
        self._item_bytes = ITEM_BYTES[self.manifest.dtype]
        shards = self.manifest.shards
        self._closes = [not after.continues for after in shards[1:]] + [True]
        self._starts = [0]
        for shard, closes in zip(shards, self._closes, strict=True):
            extra = len(bos) * (shard.documents - shard.continues)
            extra += len(eos) * (shard.documents - (not closes))
            self._starts.append(self._starts[-1] + shard.tokens + extra)
        if self._starts[-1] < 2:
            raise ValueError(
                f"{path}: {self._starts[-1]} token, and nothing to predict\n  tokenize more text"
            )
        self.tokens = self._starts[-1]
        self.windows_per_epoch = self.count_windows(self.tokens, seq_len)
        self._order = lru_cache(maxsize=2)(self._permutation)
        if self.manifest.tokens * self._item_bytes <= _VERIFIED_WHOLE_BYTES:
            self._verify_whole()

    @staticmethod
    def count_windows(tokens: int, seq_len: int) -> int:
        """W, with the last window that may be shorter."""
        return -(-(tokens - 1) // seq_len)

    def windows(self, start: int, infinite: bool) -> Iterator[TokenWindow]:
        """Windows from number ``start`` on, epoch after epoch or to the end of the first."""
        number = start
        while infinite or number < self.windows_per_epoch:
            yield TokenWindow(self, number)
            number += 1

    def pieces(self, number: int) -> list[np.ndarray]:
        """The tokens of window ``number``, int64, one piece a document.

        Raises:
            ValueError: A block of the shard is not what was written.
        """
        epoch, index = divmod(number, self.windows_per_epoch)
        if self._seed is not None:
            index = self._order(epoch)[index]
        first = index * self._seq_len
        last = min(first + self._seq_len + 1, self._starts[-1])
        return self._stream(first, last)

    def _verify_whole(self) -> None:
        """Verify every block of every shard, once in a process: validation opens its set again and again."""
        bins = [self.manifest.folder / f"{shard.name}.bin" for shard in self.manifest.shards]
        key = (self.manifest.digest, *(file.stat().st_mtime_ns for file in bins))
        if key not in _VERIFIED:
            for place in range(len(bins)):
                self._shard(place).verify_whole()
            _VERIFIED.add(key)

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.windows_per_epoch, "windows", self._seed or 0, epoch)

    def _stream(self, first: int, last: int) -> list[np.ndarray]:
        """Tokens ``first`` to before ``last`` of the stream."""
        pieces: list[np.ndarray] = []
        place = bisect.bisect_right(self._starts, first) - 1
        while first < last:
            stop = min(last, self._starts[place + 1])
            shard, start = self._shard(place), self._starts[place]
            found = self._shard_pieces(shard, self._closes[place], first - start, stop - start)
            if found and pieces and shard.entry.continues:  # the same document, cut between the shards
                pieces[-1] = np.concatenate([pieces[-1], found.pop(0)])
            pieces += found
            first, place = stop, place + 1
        return pieces

    def _shard_pieces(self, shard: _Shard, closes: bool, first: int, last: int) -> list[np.ndarray]:
        """One shard's part of the stream, ``first`` to before ``last``, counted from the shard's start."""
        before, around = len(self._bos), len(self._bos) + len(self._eos)
        absent = before if shard.entry.continues else 0  # its first document has no bos here
        documents = shard.entry.documents

        def start_of(document: int) -> int:
            return shard.offset(document) + document * around - (absent if document > 0 else 0)

        document = bisect.bisect_right(range(documents), first, key=start_of) - 1
        pieces = []
        while first < last:
            begin = start_of(document)
            bos = self._bos[:0] if document == 0 and absent else self._bos
            eos = self._eos[:0] if document == documents - 1 and not closes else self._eos
            low, high = shard.offset(document), shard.offset(document + 1)
            end = begin + len(bos) + (high - low) + len(eos)
            wanted_first, wanted_last = first - begin, min(last, end) - begin
            inner_first = max(0, wanted_first - len(bos))
            inner_last = max(0, min(high - low, wanted_last - len(bos)))
            middle = shard.read(low + inner_first, low + max(inner_first, inner_last))
            tail_first = max(0, wanted_first - len(bos) - (high - low))
            tail_last = max(0, wanted_last - len(bos) - (high - low))
            pieces.append(np.concatenate([bos[wanted_first:wanted_last], middle, eos[tail_first:tail_last]]))
            first, document = min(last, end), document + 1
        return pieces

    def _shard(self, place: int) -> _Shard:
        if place in self._open:
            self._open.move_to_end(place)
        else:
            entry = self.manifest.shards[place]
            if place not in self._verified:
                _check_digest(self.manifest.folder / f"{entry.name}.idx", entry.idx_sha256)
                self._verified[place] = bytearray(-(-entry.tokens * self._item_bytes // BLOCK_BYTES))
                _Shard(self.manifest, entry, self._verified[place]).check_offsets()
            self._open[place] = _Shard(self.manifest, entry, self._verified[place])
            if len(self._open) > _OPEN_SHARDS:  # each holds a file descriptor or two
                self._open.popitem(last=False)
        return self._open[place]


class _Shard:
    """One memory-mapped shard."""

    def __init__(self, manifest: TokenManifest, entry: ShardEntry, verified: bytearray) -> None:
        self.entry = entry
        self.place = manifest.folder / entry.name
        self._vocab_size = manifest.vocab_size
        self._ids = np.memmap(f"{self.place}.bin", np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
        index = np.memmap(f"{self.place}.idx", np.uint8, mode="r")
        cut = 8 * (entry.documents + 1)
        self._offsets = index[:cut].view("<u8")
        self._checksums = index[cut:].view("<u4")
        self._verified = verified

    def check_offsets(self) -> None:
        """Check that the documents follow each other from the first token to the last.

        Raises:
            ValueError: They do not.
        """
        steps = np.diff(self._offsets.astype(np.int64))
        if self._offsets[0] != 0 or self._offsets[-1] != self.entry.tokens or not (steps > 0).all():
            raise ValueError(
                f"{self.place}.idx: its offsets do not lead from 0 to {self.entry.tokens}\n"
                "  the file is damaged: copy it again, or tokenize again"
            )

    def offset(self, document: int) -> int:
        """First token of a document."""
        return int(self._offsets[document])

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens ``first`` to before ``last``, verified, as int64."""
        if first >= last:
            return np.empty(0, dtype=np.int64)
        size = self._ids.itemsize
        for block in range(first * size // BLOCK_BYTES, (last * size - 1) // BLOCK_BYTES + 1):
            if not self._verified[block]:
                self._verify(block)
        return self._ids[first:last].astype(np.int64)

    def verify_whole(self) -> None:
        """Verify every block."""
        for block in range(len(self._checksums)):
            if not self._verified[block]:
                self._verify(block)

    def _verify(self, block: int) -> None:
        """Compare a block with its checksum, and its ids with the vocabulary.

        Raises:
            ValueError: It is not what was written.
        """
        per_block = BLOCK_BYTES // self._ids.itemsize
        ids = self._ids[block * per_block : (block + 1) * per_block]
        if zlib.crc32(ids.data) != int(self._checksums[block]):
            raise ValueError(
                f"{self.place}.bin: changed since it was written, or damaged\n"
                f"  at tokens {block * per_block:,} to {block * per_block + len(ids) - 1:,}\n"
                "  copy it again, or tokenize again"
            )
        if int(ids.max()) >= self._vocab_size:
            position = block * per_block + int(np.argmax(ids >= self._vocab_size))
            raise ValueError(
                f"{self.place}.bin, token {position:,}: id {int(self._ids[position])} is outside the "
                f"vocabulary\n  allowed: 0 to {self._vocab_size - 1}\n  tokenize again"
            )
        self._verified[block] = 1


def _check_digest(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{file}: changed since it was written, or damaged (SHA-256 differs)\n"
            f"  got: {digest.hexdigest()[:16]}, expected: {expected[:16]}\n"
            "  copy it again, or tokenize again"
        )


def verify_token_files(path: str) -> TokenManifest:
    """Compare every file with its SHA-256.

    Raises:
        ValueError: The first one that differs.
    """
    manifest = read_manifest(path)
    for shard in manifest.shards:
        for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
            _check_digest(manifest.folder / f"{shard.name}{suffix}", expected)
    return manifest
