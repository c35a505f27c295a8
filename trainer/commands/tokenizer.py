"""``octavo tokenizer``: train a tokenizer on a dataset.

bpe            byte-level byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909; over bytes as in GPT-2):
               the first tokens are the special ones, then the 256 bytes, then the merges, most frequent
               first. Text is split as Llama 3 splits it. Written as tokenizer.json.
sentencepiece  SentencePiece's BPE (Kudo and Richardson 2018, arXiv 1808.06226) as Llama 2 uses it: digits
               alone, whitespace kept, bytes for what has no token. Written as tokenizer.model.

Any text can be encoded and decodes to itself. The result is a pure function of (kind, dataset, dataset_path,
text_field, vocab_size, max_characters).
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
SMALLEST_VOCABULARY = 256 + 2
_LONGEST_SENTENCE_BYTES = 16_384


def train_tokenizer(
    dataset: str = "python_sources",
    dataset_path: str | None = None,
    vocab_size: int = 2048,
    out: str = "outputs/tokenizer",
    max_characters: int = 100_000_000,
    kind: Literal["bpe", "sentencepiece"] = "bpe",
    text_field: str = "text",
) -> Path:
    """Train a tokenizer and write it where model.hf_assets_path can find it.

    Args:
        dataset: The dataset to learn from; the first epoch of its documents is read.
        dataset_path: Where the dataset's files lie, as in training.dataset_path.
        vocab_size: Number of tokens, the special ones included.
        out: Folder for the tokenizer's files.
        max_characters: Stop reading after this many characters.
        kind: bpe (tokenizer.json, byte-level) or sentencepiece (tokenizer.model).
        text_field: Field or column that holds the text, where records have fields.

    Returns:
        The folder that was written.

    Raises:
        ValueError: The vocabulary is smaller than all bytes, or larger than the text can fill.
    """
    from trainer.data.datasets import check_dataset, dataset_row
    from trainer.data.documents import DocumentOrder

    if vocab_size < SMALLEST_VOCABULARY + (kind == "sentencepiece"):
        raise ValueError(
            f"vocab_size = {vocab_size} is too small\n"
            f"  256 bytes and 2 special tokens need at least {SMALLEST_VOCABULARY}; sentencepiece one more"
        )
    check_dataset(dataset, dataset_path)
    documents = dataset_row(dataset).documents(dataset_path, DocumentOrder(text_field=text_field))
    counts = {"documents": 0, "characters": 0}
    texts = _limited((document.text for document in documents), max_characters, counts)
    folder = Path(out)
    train = _train_sentencepiece if kind == "sentencepiece" else _train_bpe
    train(texts, vocab_size, folder, dataset)
    print(
        f"tokenizer: {vocab_size:,} tokens from {counts['documents']:,} documents of {dataset} "
        f"({counts['characters']:,} characters) -> {folder}"
    )
    return folder


def _train_bpe(texts: Iterator[str], vocab_size: int, folder: Path, dataset: str) -> None:
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    _set_pipeline(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt != vocab_size:
        raise _too_little_text(vocab_size, dataset, f"only {learnt} tokens")
    _write(tokenizer, folder)


def _train_sentencepiece(texts: Iterator[str], vocab_size: int, folder: Path, dataset: str) -> None:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=_LONGEST_SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _too_little_text(vocab_size, dataset, str(error).split(": ")[-1]) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines, cut where the trainer would leave one out as too long."""
    step = _LONGEST_SENTENCE_BYTES // 4
    for text in texts:
        for line in text.split("\n"):
            yield from (line[i : i + step] for i in range(0, len(line), step))


def _too_little_text(vocab_size: int, dataset: str, got: str) -> ValueError:
    return ValueError(
        f"vocab_size = {vocab_size}, but the text of {dataset!r} yields {got}\n"
        "  give more text (max_characters, another dataset) or a smaller vocab_size"
    )


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
