"""Export and import: transformers computes what we compute, and nothing changes on the way."""

import base64
import json
from pathlib import Path

import pytest
import torch

from tests.trainer.interop.conftest import TINY, TOKENIZER, random_model, save_model
from trainer.cli import main
from trainer.data.tokenizer import build_tokenizer
from trainer.interop.hf_folder import open_hf_folder
from trainer.interop.hf_tokenizer import tokenizer_files

# 1B as published, with fewer layers and tokens: wide heads, grouped keys, tied, rotary scaling by 32.
ONE_B = {"n_layers": 1, "vocab_size": 2048}
MODELS = {
    "debug": ("debugmodel", {}, 128),
    "1B": ("1B", ONE_B, 256),
    "untied with scaling": ("3B", {**TINY, "vocab_size": 2048, "tied_output": False}, 512),
}
TEXTS = [
    "def main():\n\treturn 'x'\r\n",
    "Grüße; 東京タワー العربية 🦙 \u200b\x00",
    "it's 12345 words   ",
    "hell",
]


def logits_of(folder, tokens):
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize(("flavor", "overrides", "length"), MODELS.values(), ids=MODELS)
def test_transformers_computes_our_logits(tmp_path, flavor, overrides, length):
    model = random_model(flavor, max_seq_len=length, **overrides)
    checkpoint = save_model(model, tmp_path / "run", flavor, **overrides)
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "hf")]) == 0
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens)
    assert ours.std() > 0.1
    torch.testing.assert_close(logits_of(tmp_path / "hf", tokens), ours, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] == model.config.tied_output
    if flavor == "1B":
        assert config["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }


def test_transformers_reads_shards_dtype_and_tokenizer(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model = random_model(**TINY)
    save_model(model, tmp_path / "run", step=3, **TINY)
    save_model(random_model(seed=9, **TINY), tmp_path / "run", step=5, **TINY)
    out = tmp_path / "hf"
    flags = ["--step", "3", "--dtype", "bfloat16", "--max-file-gb", "0.0002"]
    assert main(["export", str(tmp_path / "run"), "--out", str(out), *flags]) == 0
    assert "step-3" in capsys.readouterr().out
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 300_000 for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.embed_tokens.weight, model.tok_embeddings.weight.bfloat16())
    assert loaded.generation_config.eos_token_id == 1
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), build_tokenizer(TOKENIZER)
    assert [theirs.encode(text) for text in TEXTS] == [[0, *ids] for ids in ours.encode_batch(TEXTS)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_gives_equal_bytes(tmp_path, dtype):
    overrides = {**TINY, "ffn_hidden_dim": 96, "norm_eps": 1e-6, "rope_theta": 10000.0}
    checkpoint = save_model(random_model(**overrides), tmp_path / "run", **overrides)
    first, second = tmp_path / "first", tmp_path / "second"
    size = ["--max-file-gb", "0.0003"]
    assert main(["export", str(checkpoint), "--out", str(first), "--dtype", dtype, *size]) == 0
    assert main(["import", str(first), "--out", str(tmp_path / "imported")]) == 0
    assert main(["export", str(tmp_path / "imported"), "--out", str(second), *size]) == 0
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert len(files) == 5 + len(list(first.glob("*.safetensors")))
    assert {path.name: path.read_bytes() for path in second.iterdir()} == files


def test_import_names_the_settings_of_a_run(tiny_hf, tmp_path, capsys):
    _, folder = tiny_hf
    assert main(["import", str(folder), "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert 'flavor = "debugmodel"' in said
    assert "n_kv_heads = 2" in said
    assert "ffn_hidden_dim = 192" in said
    assert "rope_theta" not in said  # as the flavor has it
    assert main(["import", str(folder), "--out", str(tmp_path / "own")]) == 2
    assert "step-0 is there already" in capsys.readouterr().err
    assert main(["import", str(folder), "--out", str(tmp_path / "b"), "--flavor", "8B"]) == 4
    error = capsys.readouterr().err
    assert "hidden_size 64 there, 4096 here" in error
    assert len(error.splitlines()) == 3
    assert main(["import", str(folder), "--out", str(tmp_path / "b"), "--flavor", "9B"]) == 2


def test_what_export_refuses(tiny, tmp_path, capsys):
    _, checkpoint = tiny
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["export", str(checkpoint), "--out", str(out)]) == 4
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    for flags, message in (
        (["--step", "7"], "has no effect"),
        (["--tokenizer", "/nowhere"], "no tokenizer at '/nowhere'"),
        (["--max-file-gb", "0"], "allowed: above 0"),
    ):
        assert main(["export", str(checkpoint), "--out", str(tmp_path / "x"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "absent"), "--out", str(tmp_path / "x")]) == 2
    data = checkpoint / "rank-00000.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "x")]) == 4
    assert "checksum differs" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_a_failed_write_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    from trainer.interop import hf_write

    monkeypatch.setattr(hf_write.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk is full")))
    assert main(["export", str(tiny[1]), "--out", str(tmp_path / "x")]) == 4
    assert "disk is full" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_tiktoken_ranks_become_a_tokenizer_json_of_equal_ids(tmp_path):
    """Ranks made from the bundled vocabulary: its tokens in order of their ids, without the special ones."""
    transformers = pytest.importorskip("transformers")
    vocabulary = json.loads(Path(TOKENIZER, "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    tokens = sorted((i, word) for word, i in vocabulary.items() if not word.startswith("<|"))
    lines = [base64.b64encode(bytes(letters[c] for c in word)).decode() for _, word in tokens]
    model = tmp_path / "ranks" / "tokenizer.model"
    model.parent.mkdir()
    model.write_text("".join(f"{line} {rank}\n" for rank, line in enumerate(lines)))
    ours = build_tokenizer(model)
    for name, content in tokenizer_files(model).items():
        (tmp_path / name).write_bytes(content)
    theirs, back = transformers.AutoTokenizer.from_pretrained(tmp_path), build_tokenizer(tmp_path)
    texts = [*TEXTS, Path(__file__).read_text(), "a<|eot_id|>b", "é" * 300, " \n \n\t x"]
    expected = ours.encode_batch(texts)
    assert back.encode_batch(texts) == expected
    assert (back.bos_id, back.eos_id, back.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    safe = [
        i for i, text in enumerate(texts) if "<|" not in text
    ]  # transformers reads special tokens in text
    assert [theirs.encode(texts[i]) for i in safe] == [[ours.bos_id, *expected[i]] for i in safe]
    assert [theirs.decode(ids) for ids in expected] == texts


def test_sentencepiece_goes_along(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "sp").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, this is a small corpus"] * 20),
        model_prefix=str(tmp_path / "sp" / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # as Llama 2's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    ours = build_tokenizer(tmp_path / "sp")
    for name, content in tokenizer_files(tmp_path / "sp").items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["hello world 漢", "a small corpus", "x  y"]
    assert [theirs.encode(text) for text in texts] == [[1, *ours.encode(text)] for text in texts]


def test_an_exported_folder_is_checked_like_any(tiny_hf):
    model, folder = tiny_hf
    opened = open_hf_folder(folder)
    assert opened.model_name == "llama3"
    assert set(opened.tensors) == {name for name, _ in model.named_parameters()}


def _byte_letters():
    from trainer.interop.hf_tokenizer import _byte_letters as letters

    return letters()
