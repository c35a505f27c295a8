"""Eager, compiled and checkpointed float8 linears are the same linears, bit for bit."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from converters.float8 import (
    CastConfig,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    sync_float8_amax_and_scale_history,
)
from converters.float8.gemm import CPU_HAS_ROW_SCALES
from converters.float8.linear import OPS_TO_SAVE
from converters.float8.scaling import cast_to_float8, compute_amax, inverse_scale, scale_from_amax

_DELAYED = CastConfig(scaling_type=ScalingType.DELAYED)
CONFIGS = {
    "tensorwise": Float8LinearConfig(),
    "rowwise": Float8LinearConfig.from_recipe_name("rowwise"),
    "rowwise_with_gw_hp": Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"),
    "delayed": Float8LinearConfig(
        cast_config_input=_DELAYED, cast_config_weight=_DELAYED, cast_config_grad_output=_DELAYED
    ),
    "recompute": Float8LinearConfig(force_recompute_fp8_weight_in_bwd=True),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(64, 128)
        self.w2 = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w2(nn.functional.silu(self.w1(x)))


class Checkpointed(nn.Module):
    """Per-op selective checkpointing, as the trainer applies it."""

    def __init__(self, block: nn.Module, counts: dict[str, int] | None = None) -> None:
        super().__init__()
        self.block = block

        def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
            if counts is not None:
                counts[str(op)] = counts.get(str(op), 0) + 1
            return CheckpointPolicy.MUST_SAVE if op in OPS_TO_SAVE else CheckpointPolicy.PREFER_RECOMPUTE

        self.context_fn = partial(create_selective_checkpoint_contexts, policy)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, context_fn=self.context_fn)


def train_twice(forward: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    results = []
    for _ in range(2):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results += [y.detach(), leaf.grad, model.w1.weight.grad.clone(), model.w2.bias.grad.clone()]
        if model.w1.config.uses_delayed_scaling:
            sync_float8_amax_and_scale_history(model)
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_and_checkpointed_equal_eager(name: str) -> None:
    if name.startswith("rowwise") and not CPU_HAS_ROW_SCALES:
        pytest.skip(
            "inductor before torch 2.13 compiles this to wrong values on a CPU; the converter refuses"
        )
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = convert_to_float8_training(Block(), config=CONFIGS[name])
    x = torch.randn(32, 64)
    compiled, saved = copy.deepcopy(model), copy.deepcopy(model)
    want = train_twice(model, model, x)
    for got in (
        train_twice(torch.compile(compiled, fullgraph=True), compiled, x),
        train_twice(Checkpointed(saved), saved, x),
    ):
        for a, b in zip(want, got, strict=True):
            # Scales and casts are bit-equal; a high-precision mm or a bias sum may be ordered otherwise.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if name == "delayed":
        for ours, theirs in zip(model.w1.buffers(), compiled.w1.buffers(), strict=True):
            assert torch.equal(ours, theirs)


def test_selective_checkpoint_saves_the_gemm() -> None:
    """The forward's two GEMMs are not run again: two in forward, four in backward."""
    torch.manual_seed(0)
    model = convert_to_float8_training(Block())
    calls: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    y = Checkpointed(model)(torch.randn(16, 64, requires_grad=True))
    with Count():
        y.sum().backward()
    assert calls.count("aten._scaled_mm.default") == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("float8", "power_of_2"),
    [(torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True), (torch.float8_e5m2, False)],
)
def test_compiled_scales_and_casts_are_bit_equal(
    dtype: torch.dtype, float8: torch.dtype, power_of_2: bool
) -> None:
    def cast(x: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = ()
        for dim in (None, 0, 1):
            scale = scale_from_amax(compute_amax(x, dim), float8, power_of_2)
            out += (scale, inverse_scale(scale), cast_to_float8(x, scale, float8).float())
        return out

    torch._dynamo.reset()
    compiled = torch.compile(cast, fullgraph=True)
    for seed in range(3):
        x = torch.randn(48, 80, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3
        for eager, got in zip(cast(x), compiled(x), strict=True):
            assert torch.equal(eager, got)


def test_bf16_block_under_inductor_has_no_nan() -> None:
    """Inductor's fused CPU kernel of an amax and a transposed float8 store gave NaN (torch 2.13)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = convert_to_float8_training(Block())
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
    y.float().square().sum().backward()
    for grad in (x.grad, *(p.grad for p in model.parameters())):
        assert grad is not None
        assert grad.isfinite().all()
