"""The tokenizers beside Hugging Face's: tiktoken ranks (Llama 3, tekken) and SentencePiece.

A tiktoken file is a list of byte strings with ranks; neither its split pattern nor its special tokens stand
in it. For ``tokenizer.model`` both are Llama 3's, with the special tokens after the ranks. tekken.json names
its pattern, and its special tokens come before the ranks.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.tokenizer import (
    LINE_SAFE_PATTERNS,
    LLAMA3_SPLIT_PATTERN,
    Tokenizer,
    fingerprint,
    reading,
    tokenizer_threads,
)

log = logging.getLogger(__name__)

LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL_TOKENS = 256
LLAMA4_RANKS = 200_000
TEKKEN_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

# tiktoken looks for special tokens with a regular expression, and for none at all with an empty one, which it
# finds at every character: that takes a third of its time. This one is never allowed, so never an id.
_NO_SPECIAL = {"<|no special token|>": (1 << 32) - 1}

# tiktoken's regex engine gives up on a million whitespace characters in a row. Llama 3's own tokenizer cuts
# such runs (and others) into pieces of 25,000; here only what tiktoken cannot take is cut.
_LONGEST_BLANK = 900_000
_BLANK = re.compile(rf"\s{{{_LONGEST_BLANK},}}")
_BLANK_PIECE = 25_000


class TiktokenTokenizer(Tokenizer):
    """Llama 3's ``tokenizer.model``: lines of a base64 token and its rank, special tokens after them."""

    def __init__(self, file: Path) -> None:
        data = file.read_bytes()
        with reading(file, "tiktoken tokenizer"):
            ranks = _read_ranks(data)
            if len(ranks) == LLAMA4_RANKS:
                raise ValueError("Llama 4's ranks, with another split pattern: give its tokenizer.json")
            if len(ranks) != LLAMA3_RANKS:
                log.warning(
                    "%s: %d ranks where Llama 3 has %d; its split pattern and special tokens are taken",
                    file,
                    len(ranks),
                    LLAMA3_RANKS,
                )
            special = {token: len(ranks) + i for i, token in enumerate(llama3_special_tokens())}
            self._encoding = _encoding(file.name, LLAMA3_SPLIT_PATTERN, ranks, special)
        self.file = file
        self.vocab_size = self._encoding.n_vocab
        self.bos_id = special["<|begin_of_text|>"]
        self.eos_id = special["<|end_of_text|>"]
        self.splits_at_lines = True
        self.fingerprint = fingerprint(data)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        return _encode_batch(self._encoding, texts)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, in this thread."""
        return [_encode_array(self._encoding, text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return self._encoding.decode(list(ids))


class TekkenTokenizer(Tokenizer):
    """Mistral's ``tekken.json``: special tokens first, then the ranks."""

    def __init__(self, file: Path) -> None:
        data = file.read_bytes()
        with reading(file, "tekken tokenizer"):
            values = json.loads(data)
            config = values["config"]
            self._specials = _whole_number(config, "default_num_special_tokens")
            self.vocab_size = _whole_number(config, "default_vocab_size")
            count = self.vocab_size - self._specials
            rows = values["vocab"][:count]
            if len(rows) < count or count < 256:
                raise ValueError(f"{len(rows)} tokens where the config asks for {count}")
            ranks = {base64.b64decode(row["token_bytes"], validate=True): row["rank"] for row in rows}
            pattern = config["pattern"]
            self._encoding = _encoding(file.name, pattern, _checked_ranks(ranks, len(rows)), _NO_SPECIAL)
            named = {row["rank"]: row["token_str"] for row in values.get("special_tokens") or []}
            names = named or dict(enumerate(TEKKEN_SPECIAL_TOKENS))
            self._names = [str(names.get(i, f"<SPECIAL_{i}>")) for i in range(self._specials)]
            self.bos_id, self.eos_id = self._names.index("<s>"), self._names.index("</s>")
        self.file = file
        self.splits_at_lines = pattern in LINE_SAFE_PATTERNS
        self.fingerprint = fingerprint(data)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        return [[i + self._specials for i in ids] for ids in _encode_batch(self._encoding, texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, in this thread."""
        return [_encode_array(self._encoding, text) + np.uint32(self._specials) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        parts = []
        for special, group in groupby(ids, lambda i: i < self._specials):
            if special:
                parts += [self._names[i] for i in group]
            else:
                parts.append(self._encoding.decode([i - self._specials for i in group]))
        return "".join(parts)


class SentencePieceTokenizer(Tokenizer):
    """Llama 2's ``tokenizer.model``: a SentencePiece model with its own bos and eos."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        data = file.read_bytes()
        with reading(file, "SentencePiece tokenizer"):
            if not data:  # the library takes it for "no model yet"
                raise ValueError("the file is empty")
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._processor.vocab_size()
        bos_id = self._processor.bos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = self._processor.eos_id()
        self.file = file
        self.fingerprint = fingerprint(data)
        if self.eos_id < 0:
            raise ValueError(f"{file}: no end-of-text token\n  train the SentencePiece model with an eos_id")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        return self._processor.encode(list(texts), num_threads=tokenizer_threads())

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts, in this thread."""
        return [np.asarray(array("I", ids)) for ids in map(self._processor.encode, texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; SentencePiece leaves control tokens out."""
        return self._processor.decode(list(ids))


def llama3_special_tokens() -> list[str]:
    """Llama 3's special tokens in the order of their ids, as Meta's llama-models 0.3 names them."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(LLAMA3_SPECIAL_TOKENS)]
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|finetune_right_pad_id|>"]
    tokens += ["<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    tokens += ["<|python_tag|>", "<|image|>"]
    return tokens + reserved[2 : 2 + LLAMA3_SPECIAL_TOKENS - len(tokens)]


def _read_ranks(data: bytes) -> dict[bytes, int]:
    # Not tiktoken.load: it caches by path and would miss a file that changed.
    lines = [line.split() for line in data.splitlines() if line.strip()]
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if len(line) != 2 or not line[1].isdigit():
            raise ValueError(f"line {number} is not a base64 token and its rank")
        ranks[base64.b64decode(line[0], validate=True)] = int(line[1])
    return _checked_ranks(ranks, len(lines))


def _checked_ranks(ranks: dict[bytes, int], listed: int) -> dict[bytes, int]:
    """The ranks, where they are 0, 1, 2, ... and can spell any text."""
    if len(ranks) != listed or sorted(ranks.values()) != list(range(listed)):
        raise ValueError(f"{listed} tokens whose ranks are not 0 to {listed - 1}, each once")
    if b"" in ranks or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("not every byte is a token, so not every text could be encoded")
    return ranks


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> Any:
    import tiktoken

    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _encode_batch(encoding: Any, texts: Sequence[str]) -> list[list[int]]:
    if all(len(text) < _LONGEST_BLANK for text in texts):
        return encoding.encode_ordinary_batch(list(texts), num_threads=tokenizer_threads())
    return [_encode_array(encoding, text).tolist() for text in texts]


def _encode_array(encoding: Any, text: str) -> np.ndarray:
    if len(text) < _LONGEST_BLANK or _BLANK.search(text) is None:
        return encoding.encode_to_numpy(text, disallowed_special=())
    pieces = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _cut_blanks(text)]
    return np.concatenate(pieces)


def _cut_blanks(text: str) -> Iterator[str]:
    """Cut runs of whitespace that are too long, and nothing else."""
    place = 0
    for run in _BLANK.finditer(text):
        start = run.start()
        while run.end() - start > _BLANK_PIECE:
            start += _BLANK_PIECE
            yield text[place:start]
            place = start
    if place < len(text):
        yield text[place:]


def _whole_number(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or not 0 < value < 1 << 24:
        raise ValueError(f"config.{key} is {value!r}")
    return value
