"""The layout of token files, and the index that describes them. Neither torch nor numpy.

``octavo tokenize`` writes a folder::

    index.json          format, dtype, tokenizer, and for each shard its counts and checksums
    shard-00000.bin     the tokens of its documents, one after the other, little-endian uint16 or uint32
    shard-00000.idx     documents + 1 offsets in tokens (little-endian uint64, from 0), then one CRC-32
                        (little-endian uint32) for each `BLOCK_BYTES` of the .bin
    tokenizer/          the tokenizer's files

The .bin holds text only: bos and eos are put around documents when they are read. A document that is cut
between shards goes on in the next one, which says so with ``continues``.

Nothing in an index is believed: names are shard names and no paths, the dtype is one of two words, counts
are whole numbers that agree with the sizes of the files. What does not fit is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.paths import describe_candidates, resolve_path

INDEX_FILE = "index.json"
FORMAT = "octavo-tokens"
VERSION = 1
BLOCK_BYTES = 1 << 16
ITEM_BYTES = {"uint16": 2, "uint32": 4}
_NAME = re.compile(r"shard-\d{5,9}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_INDEX_BYTES = 1 << 28
_MOST = 1 << 50


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the index describes it.

    Attributes:
        name: ``shard-00000``.
        tokens: Tokens in its .bin.
        documents: Documents, or pieces of them, in it.
        continues: Its first document began in the shard before.
        largest_id: The largest token id in it.
        bin_sha256: Checksum of the .bin.
        idx_sha256: Checksum of the .idx.
    """

    name: str
    tokens: int
    documents: int
    continues: bool
    largest_id: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class TokenManifest:
    """What an index says.

    Attributes:
        folder: Where it lies.
        dtype: ``uint16`` or ``uint32``.
        tokenizer: Fingerprint of the tokenizer.
        vocab_size: Of the tokenizer.
        shards: In their order.
        digest: SHA-256 of the index itself, which holds the checksums of everything else.
    """

    folder: Path
    dtype: str
    tokenizer: str
    vocab_size: int
    shards: tuple[ShardEntry, ...]
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards; one that is cut counts once."""
        return sum(shard.documents - shard.continues for shard in self.shards)


def idx_bytes(tokens: int, documents: int, dtype: str) -> int:
    """Size of an .idx file."""
    blocks = -(-tokens * ITEM_BYTES[dtype] // BLOCK_BYTES)
    return 8 * (documents + 1) + 4 * blocks


def read_manifest(path: str) -> TokenManifest:
    """Read and check the index of a folder of token files, and the sizes of all its files.

    Raises:
        ValueError: There is none, it is malformed, or a file is missing or of another size.
    """
    folder = resolve_path(path)
    if folder is not None and folder.name == INDEX_FILE:
        folder = folder.parent
    file = None if folder is None else folder / INDEX_FILE
    if folder is None or file is None or not file.is_file():
        unfinished = folder is not None and (folder / ".work").is_dir()
        hint = "its tokenizing did not end: run the same command again" if unfinished else ""
        raise ValueError(
            f"{path!r}: no token files\n"
            f"  looked for {INDEX_FILE} in: {describe_candidates(path)}\n"
            f"  {hint or 'give the folder that `octavo tokenize` wrote'}"
        )
    if file.stat().st_size > _MOST_INDEX_BYTES:
        raise _malformed(file, f"larger than {_MOST_INDEX_BYTES} bytes")
    data = file.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _malformed(file, f"not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise _malformed(file, f"not an index of format {FORMAT!r}, version {VERSION}")
    manifest = _manifest(file, values, hashlib.sha256(data).hexdigest())
    for shard in manifest.shards:
        _check_sizes(folder, shard, manifest.dtype)
    return manifest


def _manifest(file: Path, values: dict[str, Any], digest: str) -> TokenManifest:
    dtype = values.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _malformed(file, f"dtype is {_shown(dtype)}; allowed: {', '.join(ITEM_BYTES)}")
    tokenizer = values.get("tokenizer")
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("fingerprint"), str):
        raise _malformed(file, "no fingerprint of the tokenizer")
    vocab_size = _count(file, tokenizer, "vocab_size", "tokenizer", least=1)
    rows = values.get("shards")
    if not isinstance(rows, list) or not rows:
        raise _malformed(file, "it lists no shards")
    shards = tuple(_shard(file, row, place) for place, row in enumerate(rows))
    if len({shard.name for shard in shards}) < len(shards):
        raise _malformed(file, "it lists a shard twice")
    for shard in shards:
        if shard.largest_id >= vocab_size:
            raise _malformed(
                file, f"{shard.name} has the id {shard.largest_id}, the vocabulary ends at {vocab_size - 1}"
            )
    if shards[0].continues:
        raise _malformed(file, f"{shards[0].name} continues a shard before the first one")
    return TokenManifest(file.parent, dtype, tokenizer["fingerprint"], vocab_size, shards, digest)


def _shard(file: Path, row: Any, place: int) -> ShardEntry:
    if not isinstance(row, dict):
        raise _malformed(file, f"shard {place} is {_shown(row)}")
    name = row.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _malformed(file, f"shard {place} is named {_shown(name)}, not shard-00000 or the like")
    if not isinstance(row.get("continues"), bool):
        raise _malformed(file, f"{name}: continues is {_shown(row.get('continues'))}")
    for key in ("bin_sha256", "idx_sha256"):
        if not isinstance(row.get(key), str) or not _DIGEST.fullmatch(row[key]):
            raise _malformed(file, f"{name}: {key} is {_shown(row.get(key))}")
    return ShardEntry(
        name,
        _count(file, row, "tokens", name, least=1),
        _count(file, row, "documents", name, least=1),
        row["continues"],
        _count(file, row, "largest_id", name, least=0),
        row["bin_sha256"],
        row["idx_sha256"],
    )


def _count(file: Path, row: dict[str, Any], key: str, where: str, least: int) -> int:
    value = row.get(key)
    if type(value) is not int or not least <= value <= _MOST:
        raise _malformed(file, f"{where}: {key} is {_shown(value)}")
    return value


def _check_sizes(folder: Path, shard: ShardEntry, dtype: str) -> None:
    expected = {
        ".bin": shard.tokens * ITEM_BYTES[dtype],
        ".idx": idx_bytes(shard.tokens, shard.documents, dtype),
    }
    for suffix, size in expected.items():
        file = folder / f"{shard.name}{suffix}"
        if not file.is_file():
            raise ValueError(
                f"{file}: missing\n  {INDEX_FILE} lists it\n  copy the whole folder, or tokenize again"
            )
        if file.stat().st_size != size:
            raise ValueError(
                f"{file}: has {file.stat().st_size:,} bytes, {INDEX_FILE} says {size:,}\n"
                f"  it was cut short, or written anew ({shard.tokens:,} tokens of {dtype})\n"
                "  copy it again, or tokenize again"
            )


def _malformed(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file}: cannot be used as an index of token files\n  got: {why}\n"
        "  give the folder that `octavo tokenize` wrote, as it was written"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
