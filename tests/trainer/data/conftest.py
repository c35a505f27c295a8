from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from trainer.data.datasets import DATASETS, DatasetRow
from trainer.data.documents import Document, DocumentOrder
from trainer.data.loader import DataLoader, build_dataloader
from trainer.data.tokenizer import Tokenizer, build_tokenizer


def toy_documents(path: str | None, order: DocumentOrder) -> Iterator[Document]:
    """37 documents of 0 to 60 characters, in an order of their own every epoch."""
    lengths = random.Random(5)
    documents = [
        Document(f"toy:{i}", "".join(lengths.choices("ab cdé\n漢", k=lengths.randrange(60))))
        for i in range(36)
    ]
    documents.append(Document("toy:empty", ""))
    order.shuffle(documents)
    yield from documents[order.start :]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_tokenizer("tests/assets/tokenizer")


@pytest.fixture
def build_toy(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DataLoader]]:
    """Builds loaders of the toy dataset and closes them after the test."""
    monkeypatch.setitem(DATASETS, "toy", DatasetRow("toy", toy_documents, lambda path: None))
    loaders: list[DataLoader] = []

    def build(**changes: object) -> DataLoader:
        settings: dict = {"dataset": "toy", "tokenizer": tokenizer, "seq_len": 16, "local_batch_size": 2}
        loaders.append(build_dataloader(**{**settings, "seed": 3, **changes}))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()
