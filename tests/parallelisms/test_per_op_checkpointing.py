"""Every second matmul of a block is computed again, the same ones in every dtype, eager and compiled."""

from collections import Counter
from functools import cache

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from converters.float8 import Float8LinearConfig, convert_to_float8_training
from converters.float8.gemm import CPU_HAS_ROW_SCALES
from converters.float8.linear import OPS_TO_SAVE
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.config import ActivationCheckpointConfig
from tests.parallelisms.kept import kept_tensors, policies_recorded

TOKENS = 160
SIZES = {
    "wq": (64, 16),
    "wk": (64, 32),
    "wv": (64, 48),
    "wo": (96, 80),
    "w1": (80, 112),
    "w3": (80, 128),
    "w2": (112, 64),
}
"""(K, N) in the order in which they run; no two alike, so that a product says which linear it is of."""
NAMES = {kn: name for name, kn in SIZES.items()}
MATMULS = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default)


class Block(nn.Module):
    """Llama's, with other sizes and no attention."""

    def __init__(self):
        super().__init__()
        for name, (k, n) in SIZES.items():
            setattr(self, name, nn.Linear(k, n, bias=False))

    def forward(self, x):
        y = torch.tanh(x)
        h = self.wo(torch.cat([torch.sin(w(y)) for w in (self.wq, self.wk, self.wv)], -1))
        y = torch.tanh(h)
        return x + self.w2(torch.sigmoid(self.w1(y)) * self.w3(y)[..., :112])


RECIPES = {
    "bf16": None,
    "tensorwise": Float8LinearConfig.from_recipe_name("tensorwise"),
    "rowwise": Float8LinearConfig.from_recipe_name("rowwise"),
    "rowwise_with_gw_hp": Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"),
    "emulated": Float8LinearConfig(emulate=True),
    "mixed": Float8LinearConfig(),
}
HIGH_PRECISION = {"mixed": ("wk", "wo", "w1")}


class Matmuls(TorchDispatchMode):
    """Counts the products that are computed, by (M, K, N)."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.update([(*args[0].shape, args[1].shape[1])] if func in MATMULS else [])
        return func(*args, **(kwargs or {}))


def wrapped_block(recipe, mode, skip):
    torch.manual_seed(0)
    block = Block().to(torch.bfloat16)
    kept = HIGH_PRECISION.get(recipe, ())
    if RECIPES[recipe] is not None:
        convert_to_float8_training(
            block, config=RECIPES[recipe], module_filter_fn=lambda module, fqn: fqn not in kept
        )
    config = ActivationCheckpointConfig(
        mode=mode, selective_ac_option="op", per_op_sac_force_recompute_mm_shapes_by_fqns=list(skip)
    )
    model = nn.ModuleDict({"layers": nn.ModuleDict({"0": block})})
    apply_activation_checkpoint(model, "layers", config, OPS_TO_SAVE)
    return block


def data():
    torch.manual_seed(1)
    return torch.randn(TOKENS, 64).to(torch.bfloat16).requires_grad_()


def values(block, x, y):
    """Loss, output and gradients, after backward."""
    loss = y.float().square().mean()
    loss.backward()
    return [loss.detach(), y.detach(), x.grad, *(p.grad for p in block.parameters())]


@cache
def eager(recipe, mode, skip):
    """(products computed, tensors kept by the policy, values) of a second step, like the first."""
    block = wrapped_block(recipe, mode, skip)
    for _ in range(2):
        block.zero_grad()
        x = data()
        with policies_recorded() as contexts, Matmuls() as count:
            y = block(x)
            kept = [t for made in contexts for t in kept_tensors(made)]
            result = values(block, x, y)
    return count.found, kept, result


@cache
def compiled(recipe, mode, skip):
    """As `eager`; kept is what passes from the compiled forward to its backward."""
    torch._dynamo.reset()
    block, x, products, kept = wrapped_block(recipe, mode, skip), data(), Counter(), []

    def look(module, inputs):
        for node in module.graph.nodes:
            if node.target in MATMULS:
                left, right = (arg.meta["val"].shape for arg in node.args[:2])
                products[(*left, right[1])] += 1
        return make_boxed_func(module.forward)

    def note(t):
        kept.append(t)
        return t

    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    block.compile(backend=backend, fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = block(x)
    kept = [t for t in kept if t.data_ptr() != x.data_ptr()]
    return products, kept, values(block, x, y)


RUNS = pytest.mark.parametrize(
    ("run", "recipe"),
    [(eager, recipe) for recipe in RECIPES]
    + [(compiled, recipe) for recipe in ("bf16", "tensorwise", "rowwise")]
    + [
        pytest.param(compiled, recipe, marks=pytest.mark.slow)
        for recipe in ("rowwise_with_gw_hp", "emulated", "mixed")
    ],
)


def recomputed(run, recipe, skip=()):
    """Names of the linears whose product is computed once more than without recomputation."""
    again = run(recipe, "selective", skip)[0] - run(recipe, "none", ())[0]
    assert set(again.values()) <= {1}
    assert all(m == TOKENS for m, _, _ in again)
    return sorted(NAMES[k, n] for _, k, n in again)


def results(kept):
    """Linear -> bytes of its result, among tensors that are kept."""
    width = {n: name for name, (_, n) in SIZES.items()}
    return {
        width[t.shape[1]]: t.nbytes for t in kept if t.dim() == 2 and t.shape[0] == TOKENS and t.shape[1] > 1
    }


@RUNS
def test_every_second_matmul_is_computed_again(run, recipe):
    assert recomputed(run, recipe) == ["w3", "wk", "wo"]


@RUNS
def test_the_others_are_kept(run, recipe):
    _, kept, _ = run(recipe, "selective", ())
    element = 4 if _emulated(recipe) else 2
    # What the last one gives nothing but a sum reads, which a compiler sees.
    names = ["wq", "wv", "w1", *(["w2"] if run is eager else [])]
    assert results(kept) == {name: TOKENS * SIZES[name][1] * element for name in names}
    # Besides them amaxes, no more than a number or two a row and linear.
    rest = sum(t.nbytes for t in kept if t.dim() < 2 or 1 in t.shape)
    assert rest <= 7 * 2 * 8 * TOKENS


def _emulated(recipe):
    """Whether products are made in fp32, for want of a GEMM."""
    return recipe == "emulated" or (recipe.startswith("rowwise") and not CPU_HAS_ROW_SCALES)


@RUNS
def test_values_are_those_without_recomputation(run, recipe):
    found, expected = (run(recipe, mode, ())[2] for mode in ("selective", "none"))
    for mine, plain in zip(found, expected, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_named_linears_are_computed_again_and_not_counted(recipe):
    """Without wk the second is wv."""
    assert recomputed(eager, recipe, ("wk",)) == ["w1", "w2", "wk", "wv"]
