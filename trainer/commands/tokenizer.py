"""``octavo tokenizer``: train a byte-level BPE tokenizer on a dataset.

Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2): the first
tokens are the special ones, then the 256 bytes, then the merges, most frequent first. Any text can be
encoded and decodes to itself. Text is split as Llama 3 splits it.

The result is a pure function of (dataset, dataset_path, vocab_size, max_characters).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
SMALLEST_VOCABULARY = 256 + 2


def train_tokenizer(
    dataset: str = "python_sources",
    dataset_path: str | None = None,
    vocab_size: int = 2048,
    out: str = "outputs/tokenizer",
    max_characters: int = 100_000_000,
) -> Path:
    """Train a byte-level BPE tokenizer and write it where model.hf_assets_path can find it.

    Args:
        dataset: The dataset to learn from; the first epoch of its documents is read.
        dataset_path: Where the dataset's files lie, as in training.dataset_path.
        vocab_size: Number of tokens, the two special ones included.
        out: Folder for tokenizer.json and tokenizer_config.json.
        max_characters: Stop reading after this many characters.

    Returns:
        The folder that was written.

    Raises:
        ValueError: The vocabulary is smaller than all bytes, or larger than the text can fill.
    """
    from tokenizers import Tokenizer, models, trainers

    from trainer.data.datasets import check_dataset, dataset_row
    from trainer.data.documents import DocumentOrder

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size = {vocab_size} is too small\n"
            f"  256 bytes and 2 special tokens need at least {SMALLEST_VOCABULARY}"
        )
    check_dataset(dataset, dataset_path)
    tokenizer = Tokenizer(models.BPE())
    _set_pipeline(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    documents = dataset_row(dataset).documents(dataset_path, DocumentOrder())
    counts = {"documents": 0, "characters": 0}
    tokenizer.train_from_iterator(
        _limited((document.text for document in documents), max_characters, counts), trainer
    )
    learnt = tokenizer.get_vocab_size()
    if learnt != vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size}, but the text of {dataset!r} yields only {learnt} tokens\n"
            "  give more text (max_characters, another dataset) or a smaller vocab_size"
        )
    folder = Path(out)
    _write(tokenizer, folder)
    print(
        f"tokenizer: {vocab_size:,} tokens from {counts['documents']:,} documents of {dataset} "
        f"({counts['characters']:,} characters) -> {folder}"
    )
    return folder


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())  # the library's own order changes from call to call


def _set_pipeline(tokenizer) -> None:
    """Llama 3's split, then bytes; one bos in front when another library encodes with special tokens."""
    from tokenizers import Regex, decoders, pre_tokenizers, processors

    from trainer.data.tokenizer import LLAMA3_SPLIT_PATTERN

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B", special_tokens=[(BOS_TOKEN, 0)]
    )


def _limited(texts: Iterator[str], max_characters: int, counts: dict[str, int]) -> Iterator[str]:
    """Yield texts until ``max_characters`` have come (the last one whole), and count them."""

    def more(text: str) -> bool:
        wanted = counts["characters"] < max_characters
        if wanted:
            counts["documents"] += 1
            counts["characters"] += len(text)
        return wanted

    return itertools.takewhile(more, texts)


def _write(tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
