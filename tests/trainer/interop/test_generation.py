"""Generation: the same tokens as transformers, whatever shares the batch; sampling against known answers."""

import json
from dataclasses import replace

import pytest
import torch

from models.llama3.decoder import Llama3Decoder
from tests.trainer.interop.conftest import TINY, random_model, save_model
from trainer.cli import main
from trainer.interop.generation import Sampling, cut_logits, generate
from trainer.interop.trained import choose_devices, load_model, load_on, open_trained, tokenizer_of

PROMPTS = ["x", "import os\nimport sys\n\n\nclass Walker(Base):\n    def __init__(self", "東京 is"]
GREEDY = Sampling(temperature=0)


def run(capsys, *argv):
    """Rows of `octavo generate --json`."""
    assert main(["generate", *map(str, argv), "--json"]) == 0
    captured = capsys.readouterr()
    assert "tokens/s" in captured.err
    return [json.loads(line) for line in captured.out.splitlines()]


def test_greedy_equals_transformers_alone_and_in_a_batch(tmp_path, capsys):
    """200 tokens of a random model, for prompts of different lengths, from a run and from its export."""
    transformers = pytest.importorskip("transformers")
    overrides = {**TINY, "rope_scaling": True, "rope_original_seq_len": 64, "rope_scaling_factor": 4.0}
    save_model(random_model(**overrides), tmp_path / "run", **overrides)
    hf = tmp_path / "hf"
    assert main(["export", str(tmp_path / "run"), "--out", str(hf)]) == 0
    capsys.readouterr()
    model = transformers.AutoModelForCausalLM.from_pretrained(hf).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        whole = model.generate(ids, do_sample=False, max_new_tokens=200, eos_token_id=None, pad_token_id=1)
        expected.append(whole[0, ids.shape[1] :].tolist())
    assert min(len(set(row)) for row in expected) > 20  # no trivial repetition
    capsys.readouterr()
    flags = ["--temperature", "0", "--max-tokens", "200", "--ignore-eos"]
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    for folder, batch in ((tmp_path / "run", []), (hf, ["--batch-size", "2"])):
        rows = run(capsys, folder, *prompts, *flags, *batch)
        assert [row["tokens"] for row in rows] == expected
    alone = run(capsys, tmp_path / "run" / "step-1", "--prompt", PROMPTS[1], *flags)
    assert alone[0]["tokens"] == expected[1]


def test_the_cache_computes_what_the_whole_forward_does():
    model = random_model(**TINY)
    tokens = torch.randint(2048, (3, 40), generator=torch.Generator().manual_seed(0))
    lengths = [9, 1, 20]
    decoder = Llama3Decoder(model, 3, 40)
    with torch.no_grad():
        whole = model(tokens)
        got = [decoder.prefill(tokens[:, :20], lengths)]
        for offset in range(20):
            got.append(decoder.step(torch.stack([tokens[row, lengths[row] + offset] for row in range(3)])))
    for offset, logits in enumerate(got):
        expected = torch.stack([whole[row, lengths[row] - 1 + offset] for row in range(3)])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


@pytest.fixture
def loaded(tiny):
    return load_on(open_trained(str(tiny[1])))


def test_samples_depend_on_seed_and_prompt_number_alone(loaded):
    prompts = [[5, 6, 7], [8], [9, 10], [11] * 12]
    settings = {"max_new_tokens": 12, "stop_ids": [], "sampling": Sampling(0.9, top_k=50, seed=4)}
    together = [c.tokens for c in generate(loaded, prompts, **settings).completions]
    assert together == [c.tokens for c in generate(loaded, prompts, **settings).completions]
    split = [*generate(loaded, prompts[:1], **settings).completions]
    split += generate(loaded, prompts[1:], **settings, first_number=1).completions
    assert [c.tokens for c in split] == together
    other = generate(loaded, prompts, **{**settings, "sampling": Sampling(0.9, top_k=50, seed=5)})
    assert [c.tokens for c in other.completions] != together
    same = generate(loaded, [[8], [8]], **settings)
    assert same.completions[0].tokens != same.completions[1].tokens


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(loaded):
    prompts = [[5, 6, 7], [8, 9]]
    free = generate(loaded, prompts, max_new_tokens=20, stop_ids=[], sampling=GREEDY).completions
    stop = free[0].tokens[4]
    assert stop not in free[0].tokens[:4]
    assert stop not in free[1].tokens
    result = generate(loaded, prompts, max_new_tokens=20, stop_ids=[stop], sampling=GREEDY)
    first, second = result.completions
    assert (first.tokens, first.finished) == (free[0].tokens[:4], True)
    assert (second.tokens, second.finished) == (free[1].tokens, False)
    assert result.new_tokens == 5 + 20


def test_top_k_and_top_p_cut_what_they_should():
    probabilities = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])
    logits = probabilities.log()

    def kept(**settings):
        return cut_logits(logits, Sampling(**settings)).isfinite()[0].tolist()

    assert kept(top_k=2) == [False, True, False, True, False]
    assert kept(top_p=0.6) == [False, True, False, True, False]  # 0.4 + 0.25 reach it
    assert kept(top_p=0.66) == [False, True, False, True, True]
    assert kept(top_p=1e-6) == [False, True, False, False, False]
    assert kept(top_p=0.45) == [False, True, False, True, False]
    assert kept(top_k=3, top_p=0.45) == [False, True, False, False, False]  # 0.4 / 0.85 of what top-k left
    halved = cut_logits(logits, Sampling(temperature=0.5)).softmax(-1)
    torch.testing.assert_close(halved, probabilities**2 / (probabilities**2).sum())


def test_draws_follow_the_distribution(loaded):
    """Of 4,000 first tokens, each of the 5 likeliest comes as often as its probability says."""
    count, settings = 4000, Sampling(top_k=5, seed=1)
    draws = generate(loaded, [[3, 4]] * count, max_new_tokens=1, stop_ids=[], sampling=settings)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[3, 4]]))[:, -1]
    expected = cut_logits(logits, settings).softmax(-1)[0]
    drawn = torch.bincount(torch.tensor([c.tokens[0] for c in draws.completions]), minlength=2048) / count
    assert int((drawn > 0).sum()) == 5
    assert float((drawn - expected).abs().max()) < 0.03  # four standard deviations


def test_prompts_from_a_file_and_plain_output(tiny, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("first\n\nsecond line\n")
    flags = ["--prompt-file", str(tmp_path / "prompts.txt"), "--prompt", "zero", "--max-tokens", "3"]
    assert main(["generate", str(tiny[1]), *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- 1 of 3 ---\nzero")
    assert "--- 3 of 3 ---\nsecond line" in out
    assert out.splitlines()[-1].startswith("9 tokens in ")
    assert "cpu, float32" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to continue"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens = 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature = nan"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "5"], "no effect"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p = 1.5"),
        (["--prompt-file", "/nowhere"], "No such file"),
        (["--prompt", "a", "--device", "cuda"], "no GPU"),
        (["--prompt", "a", "--step", "1"], "is one checkpoint"),
    ],
)
def test_what_generate_refuses(tiny, capsys, flags, message):
    assert main(["generate", str(tiny[1]), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3


def test_another_tokenizer_than_the_model_was_trained_with(tiny, tmp_path, capsys):
    from trainer.commands.tokenizer import train_tokenizer

    train_tokenizer("python_sources_validation", vocab_size=300, out=str(tmp_path / "other"))
    trained = open_trained(str(tiny[1]))
    assert trained.fingerprint is None  # saved without a data position: nothing to compare with
    with pytest.raises(ValueError, match="is not the tokenizer"):
        tokenizer_of(replace(trained, fingerprint="0" * 16), str(tmp_path / "other"))
    small = replace(trained, config=replace(trained.config, vocab_size=256))
    with pytest.raises(ValueError, match="has 300 ids, the model 256"):
        tokenizer_of(small, str(tmp_path / "other"))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_tied_model_is_loaded_whole(tmp_path, devices):
    """Also where the blocks are allocated device by device; the output stays the embedding."""
    overrides = {**TINY, "tied_output": True}
    model = random_model(**overrides)
    trained = open_trained(str(save_model(model, tmp_path, **overrides)))
    loaded = load_model(trained, torch.float32, [torch.device("cpu")] * devices)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_as_few_gpus_as_the_model_needs():
    gib = 2**30
    assert choose_devices(10 * gib, []) == [torch.device("cpu")]
    assert choose_devices(50 * gib, [78 * gib] * 4) == [torch.device("cuda", 0)]
    assert choose_devices(141 * gib, [78 * gib] * 4) == [torch.device("cuda", i) for i in range(3)]
    assert len(choose_devices(900 * gib, [78 * gib] * 2)) == 2
