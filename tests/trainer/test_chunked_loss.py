"""Loss and gradients of chunks against those of whole logits; how tokens are cut and labels follow."""

import pytest
import torch
from torch import nn

from models import MODELS
from models.llama3.config import Llama3Config
from trainer.chunked_loss import _Chunks, apply_chunked_loss
from trainer.config.errors import ConfigError
from trainer.data.packing import IGNORED_LABEL
from trainer.loss import cross_entropy_sum, fused_cross_entropy_sum

SIZES = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 203, "multiple_of": 32}
ROLES = MODELS["llama3"].roles


def build(tied=False, dtype=torch.float32):
    config = Llama3Config(**SIZES, max_seq_len=50, rope_scaling=False, tied_output=tied)
    model = MODELS["llama3"].build(config).to(dtype)
    torch.manual_seed(1)
    model.init_weights()
    return model


def batch(ignored=17):
    torch.manual_seed(2)
    tokens = torch.randint(0, 203, (2, 50))
    labels = tokens.roll(-1, 1)
    labels[0, :ignored] = IGNORED_LABEL
    return tokens, labels


def gradients(model, loss):
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss_fn", [cross_entropy_sum, fused_cross_entropy_sum])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 48, 100, 4096])
def test_loss_and_gradients_are_those_of_whole_logits(chunk, tied, loss_fn):
    tokens, labels = batch()
    model = build(tied)
    want_loss = cross_entropy_sum(model(tokens), labels) / 83
    want = gradients(model, want_loss)
    model = build(tied)
    assert "at a time" in apply_chunked_loss(model, ROLES, chunk, loss_fn)
    loss = model(tokens, labels=labels) / 83
    got = gradients(model, loss)
    assert float(loss.detach()) == pytest.approx(float(want_loss), rel=1e-6)
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).norm() / want[name].norm()
        assert error < 2e-6, (name, float(error))


def test_the_weights_gradient_of_many_bf16_chunks_is_added_in_fp32():
    tokens, labels = batch()
    exact = gradients(model := build().double(), cross_entropy_sum(model(tokens), labels))["output.weight"]

    def error(chunk):
        model = build(dtype=torch.bfloat16)
        apply_chunked_loss(model, ROLES, chunk, cross_entropy_sum)
        got = gradients(model, model(tokens, labels=labels))["output.weight"]
        assert got.dtype == torch.bfloat16
        return float((got.double() - exact).norm() / exact.norm())

    # Each chunk's own rounding is smaller by as much as the chunk is; added in bf16 the errors would pile up.
    assert error(1) < 1.2 * error(4096)


def test_without_gradients_the_loss_is_the_same_and_without_labels_there_are_logits():
    tokens, labels = batch()
    model = build()
    with torch.no_grad():
        logits = model(tokens)
        apply_chunked_loss(model, ROLES, 48, cross_entropy_sum)
        assert torch.equal(model(tokens), logits)
        assert float(model(tokens, labels=labels)) == pytest.approx(
            float(cross_entropy_sum(logits, labels)), rel=1e-6
        )


def test_all_labels_ignored_gives_zero():
    tokens, labels = batch()
    model = build()
    apply_chunked_loss(model, ROLES, 48, fused_cross_entropy_sum)
    loss = model(tokens, labels=torch.full_like(labels, IGNORED_LABEL))
    got = gradients(model, loss)
    assert float(loss.detach()) == 0.0
    assert all(float(g.abs().sum()) == 0.0 for g in got.values())


def test_the_logits_are_never_whole():
    seen = []

    def loss_fn(logits, labels):
        seen.append(tuple(logits.shape))
        return cross_entropy_sum(logits, labels)

    tokens, labels = batch()
    model = build()
    apply_chunked_loss(model, ROLES, 40, loss_fn)
    model(tokens, labels=labels).backward()
    assert seen == [(1, 48, 203), (1, 48, 203), (1, 4, 203)]


def test_chunks_of_split_sequences_take_the_labels_of_every_rank():
    labels = torch.arange(2 * 64).view(2, 64)
    chunks = _Chunks(torch.Size((2, 32)), labels, 64)  # 64 tokens on each of two ranks
    cut = list(chunks)
    assert len(chunks) == len(cut) == 2
    assert [own for own, _ in cut] == [slice(0, 32), slice(32, 64)]
    # Sequence 0: rank 0 has the first half of the positions, rank 1 the second.
    assert cut[0][1].tolist() == [[*range(32), *range(32, 64)]]
    assert cut[1][1].tolist() == [[*range(64, 96), *range(96, 128)]]


def test_a_stage_without_output_and_a_chunk_of_zero_change_nothing():
    model = build()
    forward = model.output.forward
    assert apply_chunked_loss(model, ROLES, 0, cross_entropy_sum) == ""
    assert model.output.forward == forward
    model.output = None
    assert apply_chunked_loss(model, ROLES, 16, cross_entropy_sum) == ""


def test_a_model_that_takes_no_labels_is_refused():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.output = nn.Linear(4, 4)

        def forward(self, tokens, document_ids=None):
            return tokens

    with pytest.raises(ConfigError, match="takes no labels"):
        apply_chunked_loss(Other(), {"output": "output"}, 16, cross_entropy_sum)
