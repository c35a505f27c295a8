"""Tokenizers: one small interface over ``tokenizer.json``, the two kinds of ``tokenizer.model`` and tekken.

`Tokenizer.encode` never adds special tokens and never recognises one inside a text: a web page that
spells ``<|end_of_text|>`` is text, not the end of a document. Only packing adds ``bos_id`` and ``eos_id``.

Files that `build_tokenizer` reads, in a folder or given directly:

====================  ====================================================================
tokenizer.json        Hugging Face tokenizers; bos and eos from the tokenizer_config.json beside it
tokenizer.model       tiktoken ranks (text lines, Llama 3) or SentencePiece (binary, Llama 2)
tekken.json           Mistral's tiktoken ranks with their split pattern
====================  ====================================================================

This module holds the interface, the first kind, and the choice among them; `trainer.data.tokenizer_models`
holds the others. None executes code from a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.paths import describe_candidates, resolve_path

if TYPE_CHECKING:  # a configuration is checked without numpy
    import numpy as np

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "original/tokenizer.model")

# Dubey et al. 2024, arXiv 2407.21783: tiktoken's cl100k split with Llama 3's own special tokens.
LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT_PATTERN = LLAMA3_SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
LINE_SAFE_PATTERNS = (LLAMA3_SPLIT_PATTERN, TEKKEN_SPLIT_PATTERN, QWEN_SPLIT_PATTERN)
"""Patterns that always split between a newline and an ASCII letter, and look at nothing across it: no
alternative holds a newline followed by a letter, and ``\\s*[\\r\\n]+`` takes the whitespace that ends in the
newline before ``\\s+(?!\\S)`` could look ahead."""

# Asked in turn where a tokenizer.json comes without a tokenizer_config.json that names the two.
WELL_KNOWN_BOS_EOS = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
_LARGEST_FILE_BYTES = 1 << 29
_CUT = re.compile(r"\n(?=[A-Za-z])")
_PIECE_CHARACTERS = 2048
_PROBE = "The quick brown fox jumps over 1,234 lazy dogs."


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        bos_id: Put before every document; None for a tokenizer that has none (Qwen's, say).
        eos_id: Put after every document.
        vocab_size: The largest id plus one: what the model's embedding must hold at least.
        fingerprint: Identifies the tokenizer's file, so that a resumed run can tell that it changed.
        file: Where it was read from.
        splits_at_lines: The ids of a text are those of its pieces, where it is cut between a newline and
            an ASCII letter; so a long text need not be tokenized as a whole.
    """

    bos_id: int | None
    eos_id: int
    vocab_size: int
    fingerprint: str
    file: Path
    splits_at_lines: bool = False

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, in parallel where the library can."""

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts as integer arrays, without threads of its own where the library can.

        It lets go of Python's lock while it works, so that several threads may call it.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens are spelled out where the library can."""


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` read by the ``tokenizers`` library."""

    def __init__(self, file: Path) -> None:
        import tokenizers

        data = file.read_bytes()
        with reading(file, "tokenizer.json of the tokenizers library"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            # A saved tokenizer may cut or pad every text, as a fine-tuning script set it up.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True  # "<|...|>" inside a text stays text
            self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
            self.splits_at_lines = _splits_at_lines(json.loads(data))
            if not self._tokenizer.encode(_PROBE, add_special_tokens=False).ids:
                raise ValueError(f"it has no token for any word of {_PROBE!r}, and none for unknown ones")
        self.file = file
        self.fingerprint = fingerprint(data)
        self.bos_id, self.eos_id = self._bos_and_eos(file)

    def _bos_and_eos(self, file: Path) -> tuple[int | None, int]:
        config_file = file.with_name("tokenizer_config.json")
        config: Any = {}
        if config_file.is_file():
            try:
                config = json.loads(config_file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{config_file}: not valid JSON\n  got: {error}") from error
            if not isinstance(config, dict):
                raise ValueError(f"{config_file}: not a JSON object\n  got: {type(config).__name__}")
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
        if bos is not None and self._id(bos) is None:
            raise ValueError(
                f"{file}: has no token {bos!r}, which {config_file.name} names as bos_token\n"
                "  documents would begin with nothing; name one that is there, or null"
            )
        return self._id(bos), eos_id

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, by the library's own threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of many texts; the library's threads are the process's, whoever calls."""
        import numpy as np

        # The library needs many times the memory of the text that it works on: short pieces
        # stay in the processor's cache, and are 5 to 10 % faster than whole documents.
        cut = [list(text_pieces(t, _PIECE_CHARACTERS)) if self.splits_at_lines else [t] for t in texts]
        pieces = [piece for parts in cut for piece in parts]
        encodings = iter(self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        return [np.asarray(_joined(islice(encodings, len(parts)))) for parts in cut]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def text_pieces(text: str, least: int) -> Iterator[str]:
    """Cut a text where a line begins with an ASCII letter, into pieces of ``least`` characters or more.

    The pieces have the ids of the whole where `Tokenizer.splits_at_lines`.
    """
    start = 0
    while cut := _CUT.search(text, start + least):
        yield text[start : cut.end()]
        start = cut.end()
    if start < len(text) or start == 0:
        yield text[start:]


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
    if file.stat().st_size > _LARGEST_FILE_BYTES:
        raise ValueError(
            f"{file}: too large for a tokenizer\n  got: {file.stat().st_size:,} bytes\n"
            f"  allowed: at most {_LARGEST_FILE_BYTES:,}"
        )
    # Rust threads: an explicit choice silences the library's warning at a later fork, and ranks that
    # share a host share its cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("RAYON_NUM_THREADS", str(tokenizer_threads()))
    if file.suffix == ".json" and not file.name.startswith("tekken"):
        return HuggingFaceTokenizer(file)
    from trainer.data.tokenizer_models import SentencePieceTokenizer, TekkenTokenizer, TiktokenTokenizer

    if file.suffix == ".json":
        return TekkenTokenizer(file)
    with file.open("rb") as lines:
        is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", lines.readline(1024)) is not None
    return TiktokenTokenizer(file) if is_tiktoken else SentencePieceTokenizer(file)


def check_vocabulary(tokenizer_path: str, vocab_size: int, flavor: str) -> None:
    """Check that a tokenizer can be read and that every id has a row in the model's embedding.

    Raises:
        ValueError: It cannot be read, or the model's vocabulary is smaller.
    """
    tokenizer = build_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but {flavor} has vocab_size {vocab_size}; "
            "use its own tokenizer or set model.overrides.vocab_size"
        )


def tokenizer_threads() -> int:
    """Threads that tokenize by default: the host's cores, shared among its ranks."""
    ranks_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // ranks_on_host))


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library raises about a file into a message of three lines."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries' panics are no Exception
        got = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ValueError(
            f"{file}: cannot be read as a {kind}\n  got: {got}\n"
            "  download the file again (a Git LFS pointer is a common cause)"
        ) from error


def fingerprint(data: bytes) -> str:
    """A short name for a file's content."""
    return hashlib.sha256(data).hexdigest()[:16]


def _joined(encodings: Iterable[Any]) -> array[int]:
    """The ids of the library's results, one after the other."""
    found = array("I")
    for encoding in encodings:
        # array takes a list in well under half of numpy's time; numpy takes its memory as it is.
        found.extend(array("I", encoding.ids))
    return found


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):  # an added token with its flags
        token = token.get("content")
    return token if isinstance(token, str) else None


def _splits_at_lines(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of the one form that is known to (see `LINE_SAFE_PATTERNS`)."""
    normalizer, steps = settings.get("normalizer"), settings.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers") if steps.get("type") == "Sequence" else None
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, dict) for part in parts):
        return False
    split, by_bytes = parts
    pattern = split.get("pattern")
    return (
        (normalizer is None or normalizer == {"type": "NFC"})
        and split.get("type") == "Split"
        and isinstance(pattern, dict)
        and pattern.get("Regex") in LINE_SAFE_PATTERNS
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and by_bytes.get("type") == "ByteLevel"
        and not by_bytes.get("use_regex", True)
        and not by_bytes.get("add_prefix_space", True)
        and all(token.get("special") for token in settings.get("added_tokens") or [])
    )
