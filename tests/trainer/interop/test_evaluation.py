"""Perplexity against known answers, and the harness's own tasks where lm-eval is installed."""

import json
import math

import pytest
import torch

from tests.trainer.interop.conftest import TOKENIZER
from trainer.cli import main
from trainer.data.batches import Batch
from trainer.data.tokenizer import build_tokenizer
from trainer.interop.evaluation import perplexity
from trainer.interop.trained import LoadedModel, load_on, open_trained

TEXTS = ["The quick brown fox\n", "Grüße aus 東京 🦙", "x = [1, 2, 3]\n" * 15]


class Uniform(torch.nn.Module):
    """Knows nothing: every token costs ln V."""

    config = None

    def forward(self, tokens, document_ids=None):
        return torch.zeros(*tokens.shape, 2048)


def write_texts(folder):
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def test_a_model_that_knows_nothing(tmp_path):
    """Loss ln V a token; bits per byte from the exact bytes of the text, split characters too."""
    from trainer.data.loader import build_dataloader

    tokenizer = build_tokenizer(TOKENIZER)
    path = str(write_texts(tmp_path / "text"))
    for seq_len in (5, 64):
        data = build_dataloader(
            dataset="text_files",
            dataset_path=path,
            tokenizer=tokenizer,
            seq_len=seq_len,
            local_batch_size=2,
            infinite=False,
        )
        loaded = LoadedModel(Uniform(), None, torch.device("cpu"), "cpu")
        result = perplexity(loaded, data, tokenizer)
        data.close()
        # bos and eos of each document are labels, but for the first bos.
        assert result.tokens == sum(len(tokenizer.encode(text)) + 2 for text in TEXTS) - 1
        assert result.bytes == sum(len(text.encode()) for text in TEXTS)
        assert result.loss == pytest.approx(math.log(2048), rel=1e-6)
        assert result.ppl == pytest.approx(2048, rel=1e-4)
        assert result.bits_per_byte == pytest.approx(11 * result.tokens / result.bytes, rel=1e-6)


def test_eval_of_one_text_is_the_models_own_loss(tiny_hf, tmp_path, capsys):
    model, folder = tiny_hf
    (tmp_path / "one.txt").write_text(TEXTS[2])
    flags = ["--dataset-path", str(tmp_path / "one.txt"), "--seq-len", "200", "--batch-size", "1", "--json"]
    assert main(["eval", str(folder), *flags]) == 0
    got = json.loads(capsys.readouterr().out)
    tokenizer = build_tokenizer(TOKENIZER)
    ids = torch.tensor([[0, *tokenizer.encode(TEXTS[2]), 1]])
    assert ids.shape[1] < 200
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    assert got["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert got["bytes"] == len(TEXTS[2].encode())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "3"], "limit has no effect without tasks"),
        (["--tasks", "a", "--steps", "3"], "steps has no effect with tasks"),
        (["--steps", "0"], "steps = 0"),
        (["--seq-len", "0"], "seq_len = 0"),
        (["--dataset", "c5"], "no dataset is named 'c5'"),
        (["--dataset-path", "/nowhere"], "no file matches"),
    ],
)
def test_what_eval_refuses(tiny, capsys, flags, message):
    assert main(["eval", str(tiny[1]), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3


def test_batches_of_padding_count_nothing():
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    empty = Batch(tokens, torch.full((1, 4), -100), tokens, 0)
    loaded = LoadedModel(Uniform(), None, torch.device("cpu"), "cpu")
    with pytest.raises(ValueError, match="nothing to predict"):
        perplexity(loaded, [empty], build_tokenizer(TOKENIZER))


TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_tasks_of_lm_eval(tiny, tmp_path, monkeypatch, capsys):
    """A small local task; its accuracy is what the model's own log-likelihoods say."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    questions = ["The capital of France is", "2 + 2 =", "Water is", "for x in", "import"]
    choices = [" Paris", " four", " wet", " range(3)", " os"]
    rows = [
        {"question": question, "choices": choices, "answer": number}
        for number, question in enumerate(questions)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "capitals.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    flags = ["--tasks", "capitals", "--task-path", str(tasks), "--batch-size", "3", "--json"]
    assert main(["eval", str(tiny[1]), *flags]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])["capitals"]["acc,none"]
    model, tokenizer = tiny[0], build_tokenizer(TOKENIZER)
    right = 0
    for number, question in enumerate(questions):
        totals = [log_likelihood(model, tokenizer, question, choice) for choice in choices]
        right += totals.index(max(totals)) == number
    assert got == pytest.approx(right / len(questions))
    assert main(["eval", str(tiny[1]), "--tasks", "capitols", "--task-path", str(tasks)]) == 2


def test_the_harness_interface(tiny):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance

    from trainer.interop.lm_harness import OctavoLM

    model, tokenizer = tiny[0], build_tokenizer(TOKENIZER)
    lm = OctavoLM(load_on(open_trained(str(tiny[1]))), tokenizer, 2, 32)

    def ask(kind, *arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    pairs = [("a b c", " d e f g"), ("x", " y"), ("", "no context"), ("import", " os")]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    expected = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    assert [total for total, _ in found] == pytest.approx(expected, abs=1e-4)
    text = "one two three " * 40
    assert len(tokenizer.encode(text)) > 64
    (total,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = [0, *tokenizer.encode(text)]
    whole = (len(ids) - 1) // 32 * 32
    expected = sum(cross_entropy(model, ids[start : start + 33], 1) for start in range(0, whole, 32))
    rest = len(ids) - 1 - whole  # the last window reaches back, and scores what is left
    expected += cross_entropy(model, ids[-33:], 33 - rest)
    assert 0 < rest < 32
    assert total == pytest.approx(expected, abs=1e-2)
    (free,) = lm.generate_until(ask("generate_until", ("a b", {"until": [], "max_gen_toks": 9})))
    assert len(tokenizer.encode(free)) > 3
    stop = free[4]
    (cut,) = lm.generate_until(ask("generate_until", ("a b", {"until": [stop], "max_gen_toks": 9})))
    assert cut == free.split(stop)[0]


def log_likelihood(model, tokenizer, context, continuation):
    head = [0, *tokenizer.encode(context)]
    whole = [0, *tokenizer.encode(context + continuation)]
    return cross_entropy(model, whole, len(head))


def cross_entropy(model, ids, first):
    """Sum of log-probabilities of ids[first:]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float(chosen[first - 1 :].sum())
