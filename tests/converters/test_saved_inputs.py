"""What a compiled or checkpointed float8 block casts, and what it keeps for backward, by `saved_input`."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from converters.base import ConverterContext
from converters.config import Float8SectionConfig
from converters.float8 import (
    Float8Converter,
    Float8Linear,
    Float8LinearConfig,
    convert_to_float8_training,
)
from converters.float8.gathered import GatheredFloat8
from converters.float8.gemm import CPU_HAS_ROW_SCALES
from converters.float8.linear import CASTS_TO_SAVE, OPS_TO_SAVE
from converters.float8.matmul import _cast_again, _made_again
from converters.float8.scaling import cast_to_float8, compute_amax, scale_from_amax
from tests.converters.test_cast_kernels import CONFIGS, Kept, config, equal, train


class Block(nn.Module):
    """A block's linears: three read one input, two another."""

    def __init__(self, dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        for name, size in {"wq": (dim, dim), "wk": (dim, 32), "wv": (dim, 32), "wo": (32, dim)}.items():
            setattr(self, name, nn.Linear(*size, bias=False))
        for name, size in {"w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}.items():
            setattr(self, name, nn.Linear(*size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        n = self.attention_norm(x)
        h = x + self.wo(torch.sigmoid(self.wq(n)[..., :32] * self.wk(n)) * self.wv(n))
        n = self.ffn_norm(h)
        return h + self.w2(nn.functional.silu(self.w1(n)) * self.w3(n))


LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, ops: tuple[object, ...]) -> None:
        super().__init__()
        self.block = block

        def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

        self.context_fn = partial(create_selective_checkpoint_contexts, policy)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, context_fn=self.context_fn)


def graphs(
    block: nn.Module, wrap: object = lambda block: block
) -> tuple[list[Counter[str]], Counter[object]]:
    """Ops of the compiled forward and backward, and the float8 tensors that pass from one to the other."""
    seen: list[torch.fx.Graph] = []

    def look(module, inputs):
        seen.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(block if wrap is None else wrap(block), backend=backend, fullgraph=True)
    compiled(torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)).float().sum().backward()
    calls = [Counter(str(node.target).removesuffix(".default") for node in graph.nodes) for graph in seen]
    outputs = next(node for node in seen[0].nodes if node.op == "output").args[0][1:]
    values = [node.meta["val"] for node in outputs if node is not None and node.op == "call_function"]
    saved = [v for v in values if isinstance(v, Tensor) and v.dtype is torch.float8_e4m3fn]
    return calls, Counter(tuple(sorted(v.shape)) for v in saved)


def casts(calls: Counter[str]) -> dict[str, int]:
    wanted = ("aten.amax", "aten._scaled_mm", "octavo.")
    return {name.split(".")[1]: n for name, n in calls.items() if name.startswith(wanted)}


ROLES = dict.fromkeys(("wq", "wk", "wv", "w1", "w3"), "columnwise") | dict.fromkeys(("wo", "w2"), "rowwise")


def least(block: nn.Module, recipe: str, **fields: object) -> nn.Module:
    """Converted with saved_input = "least", as in a run that compiles."""
    section = Float8SectionConfig(recipe_name=recipe, saved_input="least", **fields)
    # Not the context's compile_model: with it torch 2.11 refuses scales by row, whose values it gets wrong.
    Float8Converter(section, ConverterContext("cpu", 96, roles=ROLES)).convert(block)
    return block


WEIGHTS = Counter({(64, 64): 1, (32, 64): 3, (64, 128): 3})
INPUTS = Counter({(64, 96): 2, (32, 96): 1, (96, 128): 1})
TENSORWISE_BACKWARD = {"amax": 7, "cast_both": 7, "_scaled_mm": 14}


@pytest.mark.parametrize(
    ("fields", "forward", "backward", "saved"),
    [
        # Seven linears, but four inputs: each has one amax and one cast.
        ({"saved_input": "float8"}, {"amax": 11, "cast_both": 11}, TENSORWISE_BACKWARD, WEIGHTS + INPUTS),
        (
            {"saved_input": "float8", "force_recompute_fp8_weight_in_bwd": True},
            {"amax": 11, "cast_both": 4, "cast_float8": 7},
            {**TENSORWISE_BACKWARD, "cast_transposed": 7},
            INPUTS,
        ),
        # The compiler is free to cast the saved form in forward, and here does.
        (
            {"force_recompute_fp8_weight_in_bwd": True, "saved_input": "high_precision"},
            {"amax": 11, "cast_float8": 11, "cast_transposed": 4},
            {**TENSORWISE_BACKWARD, "cast_transposed": 7},
            INPUTS,
        ),
        (
            {**vars(Float8LinearConfig.from_recipe_name("rowwise")), "saved_input": "float8"},
            {"cast_rows_and_columns": 11},
            {"cast_rows_and_columns": 7, "_scaled_mm": 14},
            WEIGHTS + INPUTS,
        ),
    ],
    ids=["saved", "weight_recomputed", "left_to_the_compiler", "rowwise"],
)
def test_compiled_block_casts_each_tensor_once(
    fields: dict[str, object],
    forward: dict[str, int],
    backward: dict[str, int],
    saved: Counter[tuple[int, ...]],
) -> None:
    if "cast_rows_and_columns" in forward and not CPU_HAS_ROW_SCALES:
        forward, backward = (
            {k: v for k, v in calls.items() if k != "_scaled_mm"} for calls in (forward, backward)
        )
        pytest.skip("row-scaled GEMMs are emulated on a CPU by this torch")
    block = convert_to_float8_training(
        Block().to(torch.bfloat16), config=Float8LinearConfig(**{**fields, "cast_kernels": "triton"})
    )
    (in_forward, in_backward), found = graphs(block)
    assert casts(in_forward) == {**forward, "_scaled_mm": 7}
    assert casts(in_backward) == backward
    assert found == saved


@pytest.mark.skipif(not CPU_HAS_ROW_SCALES, reason="this torch emulates row-scaled GEMMs on a CPU")
@pytest.mark.parametrize("recompute_weight", [False, True])
@pytest.mark.parametrize("saved", ["high_precision", "float8"])
def test_compiled_rowwise_linear_is_casts_and_gemms(saved: str, recompute_weight: bool) -> None:
    """The GEMMs' scales are what the casts gave: nothing is inverted, repeated or copied beside them."""
    fields = {"cast_kernels": "triton", "saved_input": saved}
    fields["force_recompute_fp8_weight_in_bwd"] = recompute_weight
    layer = Float8Linear(64, 32, bias=False, dtype=torch.bfloat16, config=config("rowwise", **fields))
    (forward, backward), _ = graphs(layer)
    ops = {name for name in forward + backward if name.startswith(("aten.", "prims."))}
    assert ops - {"aten.view", "aten.permute", "aten.t", "aten.expand"} == {"aten._scaled_mm"}
    assert (forward["aten._scaled_mm"], backward["aten._scaled_mm"]) == (1, 2)


@pytest.mark.parametrize(
    ("recipe", "forward", "backward"),
    [
        ("tensorwise", {"amax": 11, "cast_both": 9, "cast_float8": 2}, {"cast_transposed": 2}),
        ("rowwise", {"cast_rows_and_columns": 9, "cast_rows": 2}, {"cast_columns": 2}),
    ],
)
def test_least_casts_rowwise_inputs_again_in_backward(
    recipe: str, forward: dict[str, int], backward: dict[str, int]
) -> None:
    (in_forward, in_backward), saved = graphs(least(Block().to(torch.bfloat16), recipe))
    found = casts(in_forward)
    assert {name: n for name, n in found.items() if name != "_scaled_mm"} == forward
    found = casts(in_backward)
    both = "cast_both" if recipe == "tensorwise" else "cast_rows_and_columns"
    assert {name: n for name, n in found.items() if name not in ("_scaled_mm", "amax")} == backward | {
        both: 7
    }
    assert saved == WEIGHTS + Counter({(64, 96): 2})


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_least_has_the_numbers_of_float8(recipe: str) -> None:
    torch.manual_seed(0)
    block = Block().to(torch.bfloat16)
    x, dy = torch.randn(2, 48, 64, dtype=torch.bfloat16), torch.randn(2, 48, 64, dtype=torch.bfloat16)
    config = Float8LinearConfig(**{**CONFIGS[recipe], "cast_kernels": "triton", "saved_input": "float8"})
    want = train(convert_to_float8_training(copy.deepcopy(block), config=config), x, dy)
    block = least(block, recipe)
    checkpointed = Checkpointed(copy.deepcopy(block), OPS_TO_SAVE + CASTS_TO_SAVE)
    assert equal(train(block, x, dy), want)
    assert equal(train(checkpointed, x, dy), want)


class FeedForward(nn.Module):
    """Llama's: both factors of the product are results of GEMMs, so it is rounded alike when made again."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("rowwise", marks=pytest.mark.slow)])
def test_compiled_least_has_the_numbers_of_float8(recipe: str) -> None:
    """Whole inductor, whose passes drop operations that do nothing, and whose kernels make the product."""
    if recipe == "rowwise" and not CPU_HAS_ROW_SCALES:
        pytest.skip("inductor before torch 2.13 compiles this to wrong values on a CPU")
    torch.manual_seed(0)
    part = FeedForward().to(torch.bfloat16)
    x, dy = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(48, 64, dtype=torch.bfloat16)
    config = Float8LinearConfig(**{**CONFIGS[recipe], "cast_kernels": "triton", "saved_input": "float8"})
    found = []
    for each in (
        convert_to_float8_training(copy.deepcopy(part), config=config),
        least(copy.deepcopy(part), recipe),
    ):
        torch._dynamo.reset()
        compiled, kept = torch.compile(each, fullgraph=True), Kept()
        with kept:
            compiled(x.clone().requires_grad_())
        found.append((train(each, x, dy, compiled), kept.found))
    (want, in_float8), (got, in_least) = found
    assert equal(got, want)
    # X8, transposed in memory, of the input and of the product; beside them what w1 and w3 gave.
    assert in_float8[torch.float8_e4m3fn, (48, 64)] == 2
    assert in_least[torch.float8_e4m3fn, (48, 64)] == 1
    assert in_float8[torch.bfloat16, (48, 64)] == in_least[torch.bfloat16, (48, 64)] == 2


def test_least_waits_for_a_gradient_that_came_in_float8() -> None:
    """As after a rowwise linear under tensor parallelism; also one of no rows, and one that is not finite."""
    fields = {"cast_kernels": "triton", "saved_input": "high_precision"}
    late = Float8LinearConfig(**fields, force_recompute_fp8_input_in_bwd=True)
    for rows, first in ((48, 1.0), (48, float("nan")), (48, -1.0), (0, 1.0)):
        x, dy = torch.randn(rows, 64, dtype=torch.bfloat16), torch.randn(rows, 32, dtype=torch.bfloat16)
        dy[:1, :1] = first
        assert torch.equal(_made_again(x, dy), x)
        data = GatheredFloat8(dy.to(torch.float8_e5m2), torch.tensor(1.0), torch.bfloat16)
        assert torch.equal(_made_again(x, data), x)
        found = [
            _cast_again(x, torch.tensor(2.0), data, config) for config in (Float8LinearConfig(**fields), late)
        ]
        assert torch.equal(*(operand.data.view(torch.uint8) for operand in found))


def test_gathered_weights_are_turned_in_backward_and_not_kept_turned() -> None:
    block = convert_to_float8_training(
        Block().to(torch.bfloat16), config=Float8LinearConfig(cast_kernels="triton", saved_input="float8")
    )
    for name in LINEARS:
        linear = getattr(block, name)
        weight = linear.weight.detach()
        scale = scale_from_amax(compute_amax(weight), torch.float8_e4m3fn)
        data = cast_to_float8(weight, scale, torch.float8_e4m3fn)
        linear.weight = nn.Parameter(GatheredFloat8(data, scale, torch.bfloat16))
    (in_forward, in_backward), saved = graphs(block)
    assert casts(in_forward) == {"amax": 4, "cast_both": 4, "_scaled_mm": 7}
    assert casts(in_backward) == {**TENSORWISE_BACKWARD, "transpose_float8": 7}
    assert saved == INPUTS


def test_checkpointed_block_saves_casts_where_asked() -> None:
    block = Block().to(torch.bfloat16)
    for saved, ops, again in (
        ("high_precision", OPS_TO_SAVE, {"cast_transposed": 11}),
        ("float8", OPS_TO_SAVE + CASTS_TO_SAVE, {"cast_transposed": 7}),
    ):
        fields = {"cast_kernels": "triton", "saved_input": saved, "force_recompute_fp8_weight_in_bwd": True}
        converted = convert_to_float8_training(copy.deepcopy(block), config=Float8LinearConfig(**fields))
        (_, in_backward), kept = graphs(converted, partial(Checkpointed, ops=ops))
        assert casts(in_backward) == {**TENSORWISE_BACKWARD, **again}
        assert kept == (INPUTS if saved == "float8" else Counter())


@pytest.mark.parametrize("saved", ["high_precision", "float8"])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "delayed"])
def test_checkpointed_equals_eager(name: str, saved: str) -> None:
    torch.manual_seed(0)
    block = convert_to_float8_training(Block(), config=config(name))
    x, dy = torch.randn(32, 64), torch.randn(32, 64)
    model = convert_to_float8_training(Block(), config=config(name, cast_kernels="triton", saved_input=saved))
    model.load_state_dict(block.state_dict())
    checkpointed = Checkpointed(copy.deepcopy(model), OPS_TO_SAVE + CASTS_TO_SAVE)
    want = train(block, x, dy)
    assert equal(train(model, x, dy), want)
    assert equal(train(checkpointed, x, dy), want)
