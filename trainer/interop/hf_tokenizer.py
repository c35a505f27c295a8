"""A run's tokenizer as the files that transformers reads.

====================  =======================================================================
tokenizer.json        copied, with the settings beside it
tiktoken ranks        turned into a tokenizer.json with the same ids for every text
SentencePiece         copied, with settings that name LlamaTokenizer
====================  =======================================================================

tiktoken joins, again and again, the two neighbours whose union has the lowest rank. BPE of the tokenizers
library joins the pair that comes first in its list of merges. So the list has every pair of tokens whose
union is a token, ordered by the union's rank; and as in tiktoken, a piece that is a token is left whole.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from trainer.data.tokenizer import build_tokenizer, find_tokenizer_file
from trainer.data.tokenizer_models import LLAMA3_SPLIT_PATTERN, TiktokenTokenizer, llama3_special_tokens

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Name -> content of a tokenizer's files; `path` is its file, or the folder that holds it.

    Raises:
        ValueError: it cannot be read.
    """
    file = find_tokenizer_file(str(path))
    loaded = build_tokenizer(file)
    if isinstance(loaded, TiktokenTokenizer):
        return {
            "tokenizer.json": _from_ranks(file).encode(),
            "tokenizer_config.json": _settings("<|begin_of_text|>", "<|end_of_text|>"),
        }
    found = {file.name: file.read_bytes()}
    found.update(
        {name: file.with_name(name).read_bytes() for name in _BESIDE if file.with_name(name).is_file()}
    )
    if "tokenizer_config.json" not in found:
        if file.suffix == ".json":
            bos = None if loaded.bos_id is None else loaded.decode([loaded.bos_id])
            found["tokenizer_config.json"] = _settings(bos, loaded.decode([loaded.eos_id]))
        else:
            found["tokenizer_config.json"] = _settings(
                "<s>", "</s>", "LlamaTokenizer", unk_token="<unk>", add_bos_token=True
            )
    return found


def _settings(bos: str | None, eos: str, kind: str = "PreTrainedTokenizerFast", **others: Any) -> bytes:
    settings = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, **others}
    return json.dumps(settings, indent=2).encode() + b"\n"


def _from_ranks(file: Path) -> str:
    """The tokenizer.json of a file of tiktoken ranks with Llama 3's special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    spelled = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={spell(token): rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in merges],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in llama3_special_tokens()])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer.to_str()


def _byte_letters() -> dict[int, str]:
    """Byte -> the printable letter by which byte-level BPE writes it (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    letters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in letters]
    return {**letters, **{byte: chr(256 + i) for i, byte in enumerate(rest)}}
