import math
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.attention import BACKENDS, InnerAttention, document_mask
from models.llama3.config import FLAVORS, Llama3Config
from models.llama3.model import Llama3, TransformerBlock
from models.rope import RopeScaling, RotaryEmbedding, rope_frequencies

SMALL = Llama3Config(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128, multiple_of=32, max_seq_len=64,
    rope_original_seq_len=32,
)  # fmt: skip


def build(config, seed=0):
    model = Llama3(config)
    torch.manual_seed(seed)
    model.init_weights()
    return model


def tokens(shape=(2, 64), seed=1):
    return torch.randint(128, shape, generator=torch.Generator().manual_seed(seed))


# --- structure ---------------------------------------------------------------------------------


def test_names_and_no_biases():
    names = [n for n, _ in build(SMALL).named_parameters() if not n.startswith("layers.1")]
    assert names == [
        "tok_embeddings.weight",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "layers.0.feed_forward.w1.weight",
        "layers.0.feed_forward.w2.weight",
        "layers.0.feed_forward.w3.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    ]


def test_checkpoint_holds_no_rope_tables():
    model = build(SMALL)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_pipeline_stages_compose_to_the_model():
    whole, first, last = build(SMALL), build(SMALL), build(SMALL)
    first.norm = first.output = last.tok_embeddings = None
    del first.layers["1"], last.layers["0"]
    assert first(tokens()).shape == (2, 64, 64)
    torch.testing.assert_close(last(first(tokens())), whole(tokens()), atol=0, rtol=0)
    torch.manual_seed(0)
    last.init_weights()  # a stage draws what the whole model draws
    assert torch.equal(last.output.weight, whole.output.weight)
    assert torch.equal(last.layers["1"].attention.wq.weight, whole.layers["1"].attention.wq.weight)


def test_output_of_hidden_states_is_forward():
    model = build(SMALL)
    assert torch.equal(model.output(model.hidden_states(tokens())), model(tokens()))


# --- attention ---------------------------------------------------------------------------------


def test_causal():
    model = build(SMALL)
    changed = tokens().clone()
    changed[:, 40] = (changed[:, 40] + 1) % 128
    before, after = model(tokens()), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], atol=0, rtol=0)
    assert (before[:, 40:] - after[:, 40:]).abs().amax(dim=2).gt(1e-4).all()  # and all later ones see it


@pytest.mark.parametrize("lengths", [(64,), (1, 63), (20, 30, 14)])
def test_document_mask_equals_documents_on_their_own(lengths):
    model = build(replace(SMALL, attn_mask_type="document"))
    alone = build(SMALL)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed = model(tokens(), ids.expand(2, -1))
    pieces = torch.cat([alone(piece) for piece in tokens().split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, pieces, atol=2e-5, rtol=1e-5)


def test_document_mask_needs_ids():
    with pytest.raises(ValueError, match="needs document_ids"):
        build(replace(SMALL, attn_mask_type="document"))(tokens())


def test_grouped_queries_read_their_group():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ wide_k.mT / math.sqrt(8)).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    expected = scores.softmax(-1) @ wide_v
    torch.testing.assert_close(InnerAttention()(q, k, v), expected)
    one_document = document_mask(torch.zeros(2, 9, dtype=torch.int64))
    torch.testing.assert_close(InnerAttention()(q, k, v, one_document), expected)


def test_every_backend_name_has_kernels():
    names = typing.get_args(typing.get_type_hints(Llama3Config)["attn_backend"])
    assert names == tuple(BACKENDS)
    assert BACKENDS["auto"] == [kernel for name in names[1:] for kernel in BACKENDS[name]]


# --- RoPE --------------------------------------------------------------------------------------


def test_rope_is_a_rotation_by_relative_position():
    rope = RotaryEmbedding(head_dim=8, max_seq_len=32, theta=100.0)
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = (rope(x.expand(1, 32, 1, 8))[0, :, 0] for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(32))
    torch.testing.assert_close(turned_q[0], q)
    scores = turned_q @ turned_k.T
    for offset in (0, 3, 17):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_rope_against_complex_numbers():
    rope = RotaryEmbedding(head_dim=8, max_seq_len=16, theta=500000.0)
    x = torch.randn(2, 16, 3, 8)
    angles = torch.outer(torch.arange(16.0), rope_frequencies(8, 500000.0, None))[:, None]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rope(x), torch.view_as_real(turned).flatten(-2))


def test_rope_scaling_has_three_ranges():
    plain = rope_frequencies(128, 500000.0, None)
    scaled = rope_frequencies(128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192))
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half().float()]
)
def test_rope_tables_stay_fp32(cast):
    model, expected = build(SMALL), build(SMALL).rope.cos
    cast(model)
    assert model.rope.cos.dtype == torch.float32
    assert torch.equal(model.rope.cos, expected)
    assert model.layers["1"].attention.rope is model.rope
    assert model(tokens()).dtype == model.output.weight.dtype


def test_rope_positions_of_a_shard():
    rope = RotaryEmbedding(head_dim=8, max_seq_len=32, theta=100.0)
    x = torch.randn(1, 32, 2, 8)
    whole = rope(x)
    mine = torch.tensor([4, 5, 6, 7, 24, 25, 26, 27])
    rope.set_positions(mine)
    torch.testing.assert_close(rope(x[:, mine]), whole[:, mine])
    with pytest.raises(ValueError, match="8 positions, the input 32"):
        rope(x)
    rope.set_positions(None)
    torch.testing.assert_close(rope(x), whole)


def test_too_long_input():
    with pytest.raises(ValueError, match="64 positions, the input 65"):
        build(SMALL)(tokens((1, 65)))


# --- compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_type", ["causal", "document"])
def test_compiled_block_equals_eager(mask_type):
    model = build(replace(SMALL, attn_mask_type=mask_type))
    ids = torch.arange(64).div(20, rounding_mode="floor").expand(2, -1)
    expected = model(tokens(), ids)
    expected.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.layers.values():
        block.compile(fullgraph=True)
    got = model(tokens(), ids)
    got.square().mean().backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # blocks share one graph


# --- initial weights ---------------------------------------------------------------------------


def test_init_statistics():
    config = replace(FLAVORS["debugmodel"], n_layers=3)
    model = build(config)
    expected = {"tok_embeddings": (1.0, False), "output": (config.dim**-0.5, True)}
    for layer in range(3):
        deep = 0.02 / math.sqrt(2 * (layer + 1))
        for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1"):
            expected[f"layers.{layer}.{name}"] = (0.02, True)
        for name in ("attention.wo", "feed_forward.w2", "feed_forward.w3"):
            expected[f"layers.{layer}.{name}"] = (deep, True)
    cut = 0.98658  # std of N(0, 1) truncated at 3
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        std, truncated = expected.pop(module)
        ratio = parameter.std().item() / std
        assert ratio == pytest.approx(cut if truncated else 1.0, abs=0.006), name
        assert abs(parameter.mean().item()) < 0.02 * std
        largest = parameter.abs().max().item() / std
        assert (2.9 < largest <= 3.0001) if truncated else largest > 4, name
    assert expected == {}


@pytest.mark.parametrize(("tied", "logit_std"), [(False, 1.0), (True, 0.02 * 16)])
def test_first_loss_is_that_of_a_uniform_guess(tied, logit_std):
    model = build(replace(FLAVORS["debugmodel"], tied_output=tied, max_seq_len=64))
    x = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(2048) + logit_std**2 / 2, abs=0.15)


@pytest.mark.parametrize("tied", [False, True])
def test_meta_then_init_equals_direct(tied):
    config = replace(SMALL, tied_output=tied)
    direct = build(config, seed=7)
    with torch.device("meta"):
        model = Llama3(config)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    model.init_weights()
    for (name, got), (_, expected) in zip(
        model.state_dict().items(), direct.state_dict().items(), strict=True
    ):
        assert torch.equal(got, expected), name
    assert torch.equal(model.rope.cos, direct.rope.cos)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert torch.equal(model(tokens()), direct(tokens()))
    other = build(config, seed=8)
    assert not torch.equal(other.output.weight, direct.output.weight)


def test_sharded_init_equals_direct(tmp_path):
    """FSDP2 at world size 1, with mixed precision: same weights, tables in fp32."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Llama3(SMALL)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        seen = []
        for block in model.layers.values():
            block.attention.rope.register_forward_hook(
                lambda module, args, out: seen.append((module.cos.dtype, args[0].dtype, out.dtype))
            )
            fully_shard(block, mesh=mesh, mp_policy=precision)
        fully_shard(model, mesh=mesh, mp_policy=precision)
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        model.init_weights()
        direct = build(SMALL, seed=3)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), direct.get_parameter(name)), name
        logits = model(tokens())
        logits.float().mean().backward()
        assert set(seen) == {(torch.float32, torch.bfloat16, torch.bfloat16)}
        torch.testing.assert_close(logits.float(), direct(tokens()), atol=0.1, rtol=0.05)
    finally:
        dist.destroy_process_group()


def test_block_is_usable_alone():
    rope = RotaryEmbedding(SMALL.head_dim, 64, SMALL.rope_theta)
    block = TransformerBlock(0, SMALL, rope)
    assert block(torch.randn(2, 64, 64)).shape == (2, 64, 64)


SHARDED_INIT = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from models.llama3.config import Llama3Config
from models.llama3.model import Llama3

rank = int(sys.argv[1])
config = Llama3Config(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=130, multiple_of=32, max_seq_len=64
)
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
with torch.device("meta"):
    model = Llama3(config)
for block in model.layers.values():
    plan = {"attention.wq": ColwiseParallel(), "attention.wo": RowwiseParallel()}
    parallelize_module(block, mesh["tp"], plan)
    fully_shard(block, mesh=mesh["dp_shard"])
fully_shard(model, mesh=mesh["dp_shard"])
model.to_empty(device="cpu")
torch.manual_seed(3)
model.init_weights()
direct = Llama3(config)
torch.manual_seed(3)
direct.init_weights()
dp, tp = divmod(rank, 2)
shards = {
    "layers.1.attention.wq.weight": lambda w: w.chunk(2, 0)[tp].chunk(2, 0)[dp],
    "layers.1.attention.wo.weight": lambda w: w.chunk(2, 1)[tp].chunk(2, 0)[dp],
    "layers.1.attention.wk.weight": lambda w: w.chunk(2, 0)[dp],
    "output.weight": lambda w: w.chunk(2, 0)[dp],
}
for name, shard in shards.items():
    assert torch.equal(model.get_parameter(name).to_local(), shard(direct.get_parameter(name))), name
print("equal")
"""


def test_fsdp_and_tensor_parallel_ranks_keep_slices_of_the_direct_weights():
    """Rank 1 and 2 of 2 x 2, without communication: a fake group, one process a rank."""
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED_INIT, rank], cwd=root, stdout=subprocess.PIPE, text=True
        )
        for rank in ("1", "2")
    ]
    assert [process.communicate()[0].strip() for process in ranks] == ["equal", "equal"]
