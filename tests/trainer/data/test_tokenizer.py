from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.commands.tokenizer import train_tokenizer
from trainer.data.paths import PROJECT_ROOT
from trainer.data.tokenizer import build_tokenizer
from trainer.data.tokenizer_models import llama3_special_tokens

ASSET = str(PROJECT_ROOT / "tests/assets/tokenizer")
TEXTS = [
    "def main():\n\treturn 'x'  # comment\r\n\n\n",
    "Grüße, naïve café; 東京タワー 한국어 العربية हिन्दी",
    "🦙👩‍👩‍👧‍👦 \u200b\x00\u2028 ∑∂ \ufeff",
    "   leading and trailing   ",
    "",
]


def test_the_bundled_tokenizer_decodes_what_it_encodes(tokenizer):
    assert tokenizer.vocab_size == 2048
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_id == 1
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS
    assert [tokenizer.encode(text) for text in TEXTS] == tokenizer.encode_batch(TEXTS)
    assert tokenizer.decode([0, *tokenizer.encode("x"), 1]) == "<|begin_of_text|>x<|end_of_text|>"


def test_a_special_token_spelled_in_a_text_stays_text(tokenizer):
    text = "a<|end_of_text|>b<|begin_of_text|>"
    ids = tokenizer.encode(text)
    assert {tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_a_relative_path_is_found_from_any_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_tokenizer("./tests/assets/tokenizer").fingerprint == tokenizer.fingerprint
    assert build_tokenizer("tests/assets/tokenizer/tokenizer.json").vocab_size == 2048


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"looked for tokenizer\.json or tokenizer\.model") as caught:
            build_tokenizer(path)
        assert str(path) in str(caught.value)


def test_cutting_and_padding_saved_in_the_file_are_ignored(tmp_path, tokenizer):
    settings = json.loads(Path(ASSET, "tokenizer.json").read_text(encoding="utf-8"))
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    assert build_tokenizer(tmp_path).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_bos_and_eos_come_from_the_config_beside_the_file(tmp_path):
    shutil.copy(f"{ASSET}/tokenizer.json", tmp_path)
    assert build_tokenizer(tmp_path).eos_id == 1  # well-known names, without a config
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<|begin_of_text|>"}}))
    loaded = build_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (None, 0)
    config.write_text(json.dumps({"eos_token": "<|absent|>"}))
    with pytest.raises(ValueError, match=r"no end-of-text token \(got eos_token = '<\|absent\|>'\)"):
        build_tokenizer(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        build_tokenizer(tmp_path)


def test_a_file_that_is_no_tokenizer(tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        file = tmp_path / name
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match="Git LFS pointer"):
            build_tokenizer(file)


def test_llama3_tiktoken_files(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell"]
    ranks = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_text(ranks)
    loaded = build_tokenizer(tmp_path)
    assert loaded.vocab_size == 259 + 256
    assert (loaded.bos_id, loaded.eos_id) == (259, 260)
    assert loaded.encode("hello") == [258, ord("o")]
    assert [loaded.decode(ids) for ids in loaded.encode_batch(TEXTS)] == TEXTS
    assert loaded.decode([260]) == "<|end_of_text|>"
    assert loaded.eos_id not in loaded.encode("<|end_of_text|>")
    specials = llama3_special_tokens()
    assert len(set(specials)) == 256
    # The published Llama 3 ids, less the 128,000 ranks before them.
    assert [specials.index(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id")] == [
        6,
        7,
        9,
    ]


def test_sentencepiece_files(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, this is a small corpus"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    loaded = build_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    assert loaded.decode(loaded.encode("hello world 漢")) == "hello world 漢"
    assert max(loaded.encode("hello 漢")) < loaded.vocab_size


def test_training_is_deterministic(tmp_path, capsys):
    folders = [
        train_tokenizer("python_sources_validation", vocab_size=400, out=str(tmp_path / name))
        for name in "ab"
    ]
    files = [(folder / "tokenizer.json").read_bytes() for folder in folders]
    assert files[0] == files[1]
    loaded = build_tokenizer(folders[0])
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (400, 0, 1)
    assert "400 tokens from" in capsys.readouterr().out


def test_training_stops_at_max_characters_and_checks_the_size(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abababab"}\n' * 50)
    settings = {"dataset": "text_files", "dataset_path": str(tmp_path), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="yields only 26"):
        train_tokenizer(**settings, vocab_size=400)
    with pytest.raises(ValueError, match="need at least 258"):
        train_tokenizer(**settings, vocab_size=257)


def test_transformers_reads_what_was_trained(tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(ASSET)
    assert theirs.encode(TEXTS[1]) == [0, *tokenizer.encode(TEXTS[1])]
    assert theirs.eos_token_id == 1


def llama3_lines() -> list[str]:
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell"]
    return [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[:-2] + lines[-1:],  # a rank is missing
        lambda lines: [*lines, lines[-1]],  # a token twice
        lambda lines: [*lines[:-1], lines[-1].replace("258", "257")],  # a rank twice
        lambda lines: [lines[0], *lines[2:]],  # a byte without a token
        lambda lines: [*lines, "aGVs 99999999999999999999\n"],
        lambda lines: [*lines, "not base64! 259\n"],
        lambda lines: [*lines, "aGVs\n"],
        lambda lines: [*lines, "aGVs -1\n"],
        lambda lines: ["".join(lines)[:700]],  # cut short
    ],
)
def test_damaged_tiktoken_files_are_refused(tmp_path, spoil):
    file = tmp_path / "tokenizer.model"
    file.write_text("".join(spoil(llama3_lines())))
    with pytest.raises(
        ValueError, match=r"tokenizer\.model: cannot be read as a tiktoken tokenizer"
    ) as caught:
        build_tokenizer(file)
    assert str(caught.value).count("\n") <= 2


def test_llama4s_ranks_are_not_taken_for_llama3s(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.tokenizer_models.LLAMA4_RANKS", 259)
    (tmp_path / "tokenizer.model").write_text("".join(llama3_lines()))
    with pytest.raises(ValueError, match=r"Llama 4's ranks"):
        build_tokenizer(tmp_path)


HOSTILE_JSON = {
    "not json": b"{",
    "a list": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "binary": bytes(range(256)),
    "empty": b"",
    "no vocabulary": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "another model": b'{"version": "1.0", "added_tokens": [], "model": {"type": "Pickle"}}',
    "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "tokenizer.model"])
@pytest.mark.parametrize("content", HOSTILE_JSON)
def test_hostile_files_are_refused_in_three_lines(tmp_path, name, content):
    (tmp_path / name).write_bytes(HOSTILE_JSON[content])
    with pytest.raises(ValueError, match="cannot be read as a") as caught:
        build_tokenizer(tmp_path)
    assert str(caught.value).count("\n") <= 2


def test_a_bos_that_is_not_there_is_refused(tmp_path):
    shutil.copy(f"{ASSET}/tokenizer.json", tmp_path)
    config = {"bos_token": "<nothing>", "eos_token": "<|end_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no token '<nothing>', which"):
        build_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    assert build_tokenizer(tmp_path).bos_id is None


def test_a_tokenizer_that_drops_all_text_is_refused(tmp_path):
    settings = json.loads(Path(f"{ASSET}/tokenizer.json").read_text())
    specials = {token["content"]: token["id"] for token in settings["added_tokens"]}
    settings["model"] |= {"vocab": specials, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="it has no token for any word"):
        build_tokenizer(tmp_path)


def test_a_config_beside_the_file_that_is_no_object(tmp_path):
    shutil.copy(f"{ASSET}/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not a JSON object"):
        build_tokenizer(tmp_path)


def small_tekken(**config) -> dict:
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll"]
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for i, token in enumerate(tokens)
    ]
    settings = {"pattern": r"\w+|\W+", "default_vocab_size": 268, "default_num_special_tokens": 10}
    return {"config": {**settings, **config}, "vocab": rows}


def test_tekken_files(tmp_path):
    (tmp_path / "tekken.json").write_text(json.dumps(small_tekken()))
    loaded = build_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (268, 1, 2)
    assert loaded.encode("hello") == [266, 267, 10 + ord("o")]
    texts = [*TEXTS, "he<|no special token|>"]
    assert [ids.tolist() for ids in loaded.encode_arrays(texts)] == loaded.encode_batch(texts)
    assert loaded.decode(loaded.encode(texts[-1])) == texts[-1]
    assert loaded.decode([1, 266, 5, 2]) == "<s>he<SPECIAL_5></s>"
    for change in ({"default_vocab_size": 400}, {"default_num_special_tokens": 0}, {"pattern": "("}):
        (tmp_path / "tekken.json").write_text(json.dumps(small_tekken(**change)))
        with pytest.raises(ValueError, match="cannot be read as a tekken tokenizer"):
            build_tokenizer(tmp_path)


@given(st.text(alphabet=st.sampled_from("aB9 \t\n\r!'é漢/"), max_size=60))
def test_pieces_have_the_ids_of_the_whole(tokenizer, text):
    assert tokenizer.splits_at_lines
    cut = re.split(r"(?<=\n)(?=[A-Za-z])", text)
    assert [i for piece in cut for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@given(st.lists(st.text(alphabet=st.sampled_from("aB9 \t\n\r!'é漢/\u0301<|>"), max_size=40), max_size=5))
def test_arrays_have_the_ids_of_whole_texts(tokenizer, texts):
    texts = [*texts, "\n".join(texts), ""]
    whole = tokenizer.encode_batch(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.tokenizer._PIECE_CHARACTERS", 2)
        arrays = tokenizer.encode_arrays(texts)
    assert [ids.tolist() for ids in arrays] == whole
    assert {ids.dtype for ids in arrays} == {np.dtype(np.uint32)}


def test_only_a_tokenizer_that_splits_at_lines_gets_pieces(tmp_path, monkeypatch):
    settings = json.loads(Path(f"{ASSET}/tokenizer.json").read_text())
    # Takes an end of line and the word after it as one, so that a cut between them shows.
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\n?[a-z]+|\s+"}
    settings["model"]["vocab"]["Ċa"] = len(settings["model"]["vocab"]) + 2
    settings["model"]["merges"].insert(0, ["Ċ", "a"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    loaded = build_tokenizer(tmp_path)
    monkeypatch.setattr("trainer.data.tokenizer._PIECE_CHARACTERS", 1)
    text = "bc\na\na\nbc"
    joined = settings["model"]["vocab"]["Ċa"]
    assert loaded.encode_arrays([text])[0].tolist().count(joined) == 2
    assert loaded.encode_arrays([text])[0].tolist() == loaded.encode(text)


def test_a_sentencepiece_model_is_trained(tmp_path, capsys):
    settings = {"dataset": "python_sources_validation", "vocab_size": 500, "kind": "sentencepiece"}
    folders = [train_tokenizer(**settings, out=str(tmp_path / name), max_characters=300_000) for name in "ab"]
    files = [(folder / "tokenizer.model").read_bytes() for folder in folders]
    assert files[0] == files[1]
    loaded = build_tokenizer(folders[0])
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (500, 1, 2)
    assert [loaded.decode(ids) for ids in loaded.encode_batch(TEXTS)] == TEXTS
    assert len(loaded.encode("    def main(self):")) < 12
    (tmp_path / "a.jsonl").write_text('{"text": "abababab"}\n' * 50)
    with pytest.raises(ValueError, match="but the text of 'text_files' yields"):
        train_tokenizer("text_files", str(tmp_path), 5000, str(tmp_path / "c"), kind="sentencepiece")
