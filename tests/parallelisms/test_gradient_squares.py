"""Norms of squares that were added up on the way: those of the gradients, unless these were written since."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from kernels.sum_chunks import SPAN, sum_chunks
from parallelisms import gradient_squares
from parallelisms.fsdp import apply_fsdp
from parallelisms.gradient_squares import recall, remember
from tests.parallelisms.test_fsdp import of_four_ranks
from trainer.optim.clipping import GradNorms, total_norm

WIDTHS = {"0": (64, 64), "1": (30, 64), "2": (64, 30)}
"""Rows and columns: over 4 ranks whole spans; uneven shards; less than a span."""


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in WIDTHS.items()}
        )

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def worker(rank, folder):
    """(how many squares are known, norm, norm as it is without them, single norms) of each case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    found = {}
    for name, shape, names in (
        ("fsdp", (4,), ("dp_shard",)),
        ("accumulated", (4,), ("dp_shard",)),
        ("scaled", (4,), ("dp_shard",)),
        ("hsdp", (2, 2), ("dp_replicate", "dp_shard")),
    ):
        torch.manual_seed(0)
        model = Stack()
        with mock.patch("parallelisms.fsdp._norms_are_fp32", return_value=True):
            apply_fsdp(
                model,
                "layers",
                {},
                init_device_mesh("cpu", shape, mesh_dim_names=names),
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
                reshard_after_forward=True,
                cpu_offload=False,
                reduce_scatter="bfloat16_wire",
                accumulates=name == "accumulated",
            )
        steps = []
        for step in range(2):
            for micro_batch in range(1 + (name == "accumulated")):
                torch.manual_seed(100 * step + 10 * micro_batch + rank)
                model(torch.randn(8, 64)).float().square().sum().backward()
            grads = [p.grad for p in model.parameters()]
            if name == "scaled":
                grads[0].to_local().mul_(2)
            known = [recall(g.to_local()) is not None for g in grads]
            single = GradNorms()
            norm = total_norm(grads, single=single)
            places = {p: float(n) for ps, ns in single.parts for p, n in zip(ps, ns, strict=True)}
            assert not gradient_squares._known
            steps.append((known, float(norm), float(total_norm(grads)), places))
            own = [float(g.to_local().double().norm()) for g in grads]
            assert [places[i] for i in range(3)] == pytest.approx(own, rel=1e-6)
            model.zero_grad()
        found[name] = steps
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_norms_are_made_of_squares_where_these_are_still_true():
    for found in of_four_ranks(worker):
        for name, steps in found.items():
            for known, norm, want, _ in steps:
                assert known[0] == (name == "fsdp"), name
                assert known[2] is False
                assert norm == pytest.approx(want, rel=1e-6)
            assert steps[0][1] != steps[1][1]


@pytest.fixture
def forgets():
    yield
    gradient_squares.forget()


def known_sums(n=4 * SPAN):
    torch.manual_seed(0)
    out, squares = torch.empty(n), torch.empty(-(-n // SPAN))
    sum_chunks(torch.randn(2, n).bfloat16(), out, squares)
    remember(out, squares)
    return out


@pytest.mark.usefixtures("forgets")
def test_views_of_whole_spans_are_known():
    out = known_sums(4 * SPAN + 100)
    for begin, size in ((0, SPAN), (SPAN, 3 * SPAN), (0, 4 * SPAN)):
        view = out.as_strided((size // 64, 64), (64, 1), begin)
        assert float(recall(view).sum()) == pytest.approx(float(view.double().square().sum()), rel=1e-6)
    for begin, size in ((1, SPAN), (0, SPAN - 1), (4 * SPAN, 100)):
        assert recall(out[begin : begin + size]) is None
    assert recall(out[: 2 * SPAN].view(-1, 2).t()) is None
    assert recall(out[: 2 * SPAN].view(torch.bfloat16)) is None
    assert recall(torch.empty(SPAN)) is None


@pytest.mark.usefixtures("forgets")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad):
    out, squares = torch.empty(2 * SPAN), torch.empty(2)
    chunks = torch.ones(2, 2 * SPAN).bfloat16()
    chunks[1, SPAN + 7] = bad
    sum_chunks(chunks, out, squares)
    remember(out, squares)
    single = GradNorms()
    assert not total_norm([out[:SPAN], out[SPAN:]], single=single).isfinite()
    assert single.not_finite() == [1]


@pytest.mark.usefixtures("forgets")
def test_a_write_makes_them_unknown():
    out = known_sums()
    view = out[:SPAN]
    assert recall(view) is not None
    out[-1] = 0
    assert recall(view) is None
