"""The tensor-parallel planner on a fake group, and over two gloo processes against one process."""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from models import MODELS
from parallelisms.tensor_parallel import GatherInput, SharedInputStyle, apply_tensor_parallel
from tests.ranks import run_ranks
from trainer.loss import cross_entropy_sum

SPEC = MODELS["llama3"]
CONFIG = dataclasses.replace(
    SPEC.flavors["debugmodel"], n_layers=2, dim=64, n_heads=4, n_kv_heads=2, vocab_size=128, max_seq_len=32
)
TOKENS = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.roll(-1, 1).masked_fill(TOKENS < 20, -100)


def meta_model(**changes):
    with torch.device("meta"):
        return SPEC.build(dataclasses.replace(CONFIG, **changes))


# The plan, without communication.


@pytest.fixture
def tp_mesh():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))["tp"]
    dist.destroy_process_group()


def test_every_role_is_split_and_counted(tp_mesh):
    model = meta_model()
    note = apply_tensor_parallel(model, SPEC.roles, tp_mesh)
    assert note == (
        "tensor parallel over 2: 16 matrices split, 5 norms sequence-parallel, 5 gathered inputs; "
        "logits sharded over the vocabulary"
    )
    local = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    hidden = model.layers["0"].feed_forward.w1.out_features
    assert local["tok_embeddings.weight"] == local["output.weight"] == (64, 64)
    assert local["layers.1.attention.wq.weight"] == (32, 64)
    assert local["layers.1.attention.wk.weight"] == (16, 64)
    assert local["layers.1.attention.wo.weight"] == (64, 32)
    assert local["layers.1.feed_forward.w2.weight"] == (64, hidden // 2)
    assert local["layers.1.ffn_norm.weight"] == (64,)


def test_a_pattern_that_matches_nothing_is_an_error(tp_mesh):
    with pytest.raises(ValueError, match=r"'layers\.\*\.attention\.wx' matches no module; the nearest is"):
        apply_tensor_parallel(meta_model(), {**SPEC.roles, "layers.*.attention.wx": "columnwise"}, tp_mesh)


def test_a_tied_output_is_still_tied(tp_mesh):
    model = meta_model(tied_output=True)
    apply_tensor_parallel(model, SPEC.roles, tp_mesh)
    assert isinstance(model.output.weight, DTensor)
    assert model.output.weight is model.tok_embeddings.weight


class Marked(ParallelStyle):
    """A gather of a converter's own, equal to others with its name."""

    applied: list = []  # noqa: RUF012

    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return isinstance(other, Marked) and self.name == other.name

    __hash__ = None

    def _apply(self, module, device_mesh):
        self.applied.append((self.name, type(module).__name__))
        return GatherInput()._apply(module, device_mesh)


class Own(ColwiseParallel, SharedInputStyle):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def shared_input(self, module):
        return Marked(self.name)


def test_siblings_that_agree_choose_how_their_input_is_gathered(tp_mesh):
    """All of w1, w3 want one gather; wq wants it too, but its plain siblings cannot use it."""
    Marked.applied.clear()
    asked = []

    def style_for(fqn, module, role):
        asked.append((fqn, role))
        return Own("own") if fqn.endswith((".wq", ".w1", ".w3")) else None

    note = apply_tensor_parallel(meta_model(), SPEC.roles, tp_mesh, style_for=style_for)
    assert Marked.applied == [("own", "FeedForward")] * 2
    assert "16 matrices split (6 by a converter's style)" in note
    assert "5 gathered inputs, 2 of them as a converter says" in note
    assert ("layers.1.attention.wo", "rowwise") in asked
    assert len(asked) == 21


# The numbers, over two processes.


def build(mesh=None, *, compiled=False, fsdp=False, loss_parallel=True, **changes):
    model = meta_model(**changes)
    if mesh is not None:
        apply_tensor_parallel(model, SPEC.roles, mesh["tp"], loss_parallel=loss_parallel)
    if compiled:
        for block in model.layers.values():
            block.compile(backend="aot_eager", fullgraph=True)
    if fsdp:
        for block in model.layers.values():
            fully_shard(block, mesh=mesh["dp_shard"])
        fully_shard(model, mesh=mesh["dp_shard"])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model


def loss_and_gradients(model, loss_fn=cross_entropy_sum):
    loss = loss_fn(model(TOKENS), LABELS)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def worst(got, want):
    """Relative differences: of the loss, and the largest of a parameter's gradient, with its name."""
    errors = {name: float((got[1][name] - g).norm() / g.norm()) for name, g in want[1].items()}
    name = max(errors, key=errors.get)
    return abs(got[0] - want[0]) / want[0], errors[name], name


def cross_entropies(mesh):
    """Sharded against whole logits: loss and gradient, fp32 and bf16, eager and compiled."""
    found = {}
    logits = 10 * torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(cross_entropy_sum, backend="aot_eager")
    for name, dtype, loss_fn in (
        ("fp32", torch.float32, cross_entropy_sum),
        ("bf16", torch.bfloat16, cross_entropy_sum),
        ("compiled", torch.float32, compiled),
    ):
        whole = logits.to(dtype, copy=True).requires_grad_()
        want = cross_entropy_sum(whole, LABELS) / 7
        want.backward()
        local = logits.to(dtype).chunk(2, -1)[mesh.get_local_rank()].clone().requires_grad_()
        got = loss_fn(DTensor.from_local(local, mesh, (Shard(2),)), LABELS) / 7
        got.backward()
        assert got.dtype == torch.float32
        difference = local.grad - whole.grad.chunk(2, -1)[mesh.get_local_rank()]
        found[name] = (float((got - want).abs() / want), float(difference.abs().max()))
    return found


def worker(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))
        one, tied = loss_and_gradients(build()), loss_and_gradients(build(tied_output=True))
        document = {"attn_mask_type": "document"}
        ids = (TOKENS < 20).cumsum(1)
        found = {
            "eager": worst(loss_and_gradients(build(mesh)), one),
            "compiled": worst(loss_and_gradients(build(mesh, compiled=True, fsdp=True)), one),
            "gathered": worst(loss_and_gradients(build(mesh, loss_parallel=False)), one),
            "tied": worst(loss_and_gradients(build(mesh, tied_output=True, fsdp=True)), tied),
            "cross_entropy": cross_entropies(mesh["tp"]),
        }
        with torch.no_grad():
            want = build(**document)(TOKENS, ids)
            got = build(mesh, loss_parallel=False, **document)(TOKENS, ids)
        found["document"] = float((got - want).abs().max())
        logits = build(mesh)(TOKENS)
        found["logits"] = (type(logits).__name__, tuple(logits.to_local().shape))
        torch.save(found, f"{folder}/found{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    """What both ranks found; rank 1's must equal rank 0's."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, 2, folder)
        return torch.load(Path(folder) / "found0")


@pytest.mark.parametrize("layout", ["eager", "compiled", "gathered", "tied"])
def test_loss_and_every_gradient_equal_those_of_one_process(found, layout):
    """Compiled: the embedding too, which gets its gradient through the first compiled block."""
    loss, gradient, name = found[layout]
    assert loss < 1e-6
    assert gradient < 2e-6, name


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-6), ("bf16", 4e-3), ("compiled", 1e-6)])
def test_cross_entropy_over_vocabulary_shards(found, kind, tolerance):
    loss, gradient = found["cross_entropy"][kind]
    assert loss < 1e-6
    assert gradient < tolerance


def test_documents_stay_apart(found):
    assert found["document"] < 1e-5


def test_logits_stay_sharded(found):
    assert found["logits"] == ("DTensor", (2, 32, 64))
