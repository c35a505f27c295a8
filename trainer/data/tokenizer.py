"""Tokenizers: one small interface over ``tokenizer.json`` and the two kinds of ``tokenizer.model``.

`Tokenizer.encode` never adds special tokens and never recognises one inside a text: a web page that
spells ``<|end_of_text|>`` is text, not the end of a document. Only packing adds ``bos_id`` and ``eos_id``.

Files that `build_tokenizer` reads, in a folder or given directly:

====================  ====================================================================
tokenizer.json        Hugging Face tokenizers; bos and eos from the tokenizer_config.json beside it
tokenizer.model       tiktoken ranks (text lines, Llama 3) or SentencePiece (binary, Llama 2)
====================  ====================================================================
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.data.paths import describe_candidates, resolve_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# Dubey et al. 2024, arXiv 2407.21783: tiktoken's cl100k split with Llama 3's own special tokens.
LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = 256

# Asked in turn where a tokenizer.json comes without a tokenizer_config.json that names the two.
WELL_KNOWN_BOS_EOS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        bos_id: Put before every document; None for a tokenizer that has none (Qwen's, say).
        eos_id: Put after every document.
        vocab_size: The largest id plus one: what the model's embedding must hold at least.
        fingerprint: Identifies the tokenizer's file, so that a resumed run can tell that it changed.
    """

    bos_id: int | None
    eos_id: int
    vocab_size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, in parallel where the library can."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens are spelled out where the library can."""


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{file}: not a tokenizer that the tokenizers library can read\n"
                f"  got: {error}\n"
                "  download tokenizer.json again (a Git LFS pointer is a common cause)"
            ) from error
        # A saved tokenizer may cut or pad every text, as a fine-tuning script set it up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|...|>" inside a text stays text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _fingerprint(file)
        self.bos_id, self.eos_id = self._bos_and_eos(file)

    def _bos_and_eos(self, file: Path) -> tuple[int | None, int]:
        config_file = file.with_name("tokenizer_config.json")
        config: dict[str, Any] = {}
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{config_file}: not valid JSON\n  got: {error}") from error
        bos, eos = (_token_text(config.get(key)) for key in ("bos_token", "eos_token"))
        if eos is None:
            known = (pair for pair in WELL_KNOWN_BOS_EOS if self._id(pair[1]) is not None)
            bos, eos = next(known, (None, None))
        eos_id = self._id(eos)
        if eos_id is None:
            raise ValueError(
                f"{file}: no end-of-text token (got eos_token = {eos!r})\n"
                f"  documents are separated by it; name one in {config_file.name} beside the file:\n"
                '  {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}'
            )
        return self._id(bos), eos_id

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class TiktokenTokenizer(Tokenizer):
    """Llama 3's ``tokenizer.model``: lines of a base64 token and its rank, special tokens after them."""

    def __init__(self, file: Path) -> None:
        import tiktoken

        # Not tiktoken.load: it caches by path and would miss a file that changed.
        lines = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        special = {token: len(ranks) + i for i, token in enumerate(llama3_special_tokens())}
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=LLAMA3_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = self._encoding.n_vocab
        self.bos_id = special["<|begin_of_text|>"]
        self.eos_id = special["<|end_of_text|>"]
        self.fingerprint = _fingerprint(file)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=_tokenizer_threads())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return self._encoding.decode(list(ids))


class SentencePieceTokenizer(Tokenizer):
    """Llama 2's ``tokenizer.model``: a SentencePiece model with its own bos and eos."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.vocab_size = self._processor.vocab_size()
        bos_id = self._processor.bos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = self._processor.eos_id()
        self.fingerprint = _fingerprint(file)
        if self.eos_id < 0:
            raise ValueError(f"{file}: no end-of-text token\n  train the SentencePiece model with an eos_id")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        return self._processor.encode(list(texts), num_threads=_tokenizer_threads())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; SentencePiece leaves control tokens out."""
        return self._processor.decode(list(ids))


def llama3_special_tokens() -> list[str]:
    """Llama 3's special tokens in the order of their ids."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(LLAMA3_SPECIAL_TOKENS)]
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4]]
    tokens += ["<|start_header_id|>", "<|end_header_id|>", reserved[4], "<|eot_id|>"]
    return tokens + reserved[5 : 5 + LLAMA3_SPECIAL_TOKENS - len(tokens)]


def find_tokenizer_file(path: str) -> Path:
    """The tokenizer file at ``path``, which may be the file or the folder that holds it; reads nothing.

    A relative path is also looked for from the checkout's root.

    Raises:
        ValueError: Nothing is there.
    """
    place = resolve_path(path)
    if place is not None and place.is_file():
        return place
    for name in TOKENIZER_FILES:
        if place is not None and (place / name).is_file():
            return place / name
    raise ValueError(
        f"no tokenizer at {path!r}: looked for {' or '.join(TOKENIZER_FILES)}\n"
        f"  looked at: {describe_candidates(path)}\n"
        "  give the folder of a downloaded model, ./tests/assets/tokenizer, or run octavo tokenizer train"
    )


def build_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer at ``path``: a file, or the folder that holds it.

    Raises:
        ValueError: No tokenizer is there, it cannot be read, or it has no end-of-text token.
    """
    file = find_tokenizer_file(str(path))
    # Rust threads: an explicit choice silences the library's warning at a later fork, and ranks that
    # share a host share its cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("RAYON_NUM_THREADS", str(_tokenizer_threads()))
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    with file.open("rb") as lines:
        is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", lines.readline(1024)) is not None
    try:
        return TiktokenTokenizer(file) if is_tiktoken else SentencePieceTokenizer(file)
    except (ValueError, RuntimeError, OSError) as error:
        kind = "tiktoken" if is_tiktoken else "SentencePiece"
        raise ValueError(
            f"{file}: cannot be read as a {kind} tokenizer\n  got: {str(error).splitlines()[0]}\n"
            "  download the file again (a Git LFS pointer is a common cause)"
        ) from error


def _tokenizer_threads() -> int:
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // ranks_on_host))


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):  # an added token with its flags
        token = token.get("content")
    return token if isinstance(token, str) else None


def _fingerprint(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
