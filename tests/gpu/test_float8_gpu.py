"""Float8 on a CUDA GPU: accuracy at model size, compile, checkpointing, real GEMMs against emulation."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from converters.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    sync_float8_amax_and_scale_history,
)
from converters.float8.linear import OPS_TO_SAVE
from converters.float8.scaling import cast_to_float8, compute_amax, inverse_scale, scale_from_amax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    pytestmark.append(pytest.mark.skip(reason="needs compute capability 9.0 for rowwise float8"))

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
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sqnr_db(want: Tensor, got: Tensor) -> float:
    want, got = want.double(), got.double()
    noise = (want - got).square().sum()
    return (10 * torch.log10(want.square().sum() / noise)).item() if noise > 0 else math.inf


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

        def policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in OPS_TO_SAVE else CheckpointPolicy.PREFER_RECOMPUTE

        self.context_fn = partial(create_selective_checkpoint_contexts, policy)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False, context_fn=self.context_fn)


def run(forward: nn.Module, model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_swiglu_at_8b_size(name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"):
        reference = SwiGLU(4096, 14336).to(torch.bfloat16)
        x, dy = torch.randn(2, 8192, 4096, dtype=torch.bfloat16).unbind(0)
    model = convert_to_float8_training(copy.deepcopy(reference), config=CONFIGS[name])
    forward = torch.compile(model, fullgraph=True) if compiled else model
    for want, got in zip(run(reference, reference, x, dy), run(forward, model, x, dy), strict=True):
        assert sqnr_db(want, got) > 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_and_checkpointed_match_eager(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = convert_to_float8_training(SwiGLU(256, 512).to(dtype), config=CONFIGS[name])
        x, dy = torch.randn(2, 200, 256, dtype=dtype).unbind(0)  # M not divisible by 16
    compiled, saved, both = (copy.deepcopy(model) for _ in range(3))
    for _ in range(2):
        want = run(model, model, x, dy)
        for got, bits in (
            (run(Checkpointed(saved), saved, x, dy), True),
            (run(torch.compile(compiled, fullgraph=True), compiled, x, dy), False),
            (run(torch.compile(Checkpointed(both), fullgraph=True), both, x, dy), False),
        ):
            for a, b in zip(want, got, strict=True):
                assert b.isfinite().all()
                # A compiler keeps fp32 between fused ops where eager rounds to bf16 or fp16.
                assert torch.equal(a, b) if bits else sqnr_db(a, b) > 20
        if name == "delayed":
            for each in (model, compiled, saved, both):
                sync_float8_amax_and_scale_history(each)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_real_gemms_agree_with_emulation(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    with torch.device("cuda"):
        real = Float8Linear(1024, 512, dtype=dtype, config=CONFIGS[name])
        x, dy = torch.randn(208, 1024, dtype=dtype), torch.randn(208, 512, dtype=dtype)
    emulated = Float8Linear.from_float(real, Float8LinearConfig(**{**vars(CONFIGS[name]), "emulate": True}))
    for a, b in zip(run(real, real, x, dy), run(emulated, emulated, x, dy), strict=True):
        assert sqnr_db(a, b) > 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_compiled_scales_and_casts_are_bit_equal(
    float8: torch.dtype, power_of_2: bool, dtype: torch.dtype
) -> None:
    def cast(x: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = ()
        for dim in (None, 0, 1):
            scale = scale_from_amax(compute_amax(x, dim), float8, power_of_2)
            x8 = cast_to_float8(x, scale, float8)
            out += (scale, inverse_scale(scale), x8, x8.t().contiguous())
        return out

    torch._dynamo.reset()
    compiled = torch.compile(cast, fullgraph=True)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(256, 384, device="cuda", dtype=dtype) * 3
        for eager, got in zip(cast(x), compiled(x), strict=True):
            assert torch.equal(eager.float(), got.float())


@pytest.mark.parametrize("name", CONFIGS)
def test_edges(name: str) -> None:
    layer = Float8Linear(64, 32, device="cuda", dtype=torch.bfloat16, config=CONFIGS[name])
    for m in (0, 1, 7, 16):
        x = torch.randn(m, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert torch.equal(layer(torch.zeros_like(x)), layer.bias.detach().expand(16, 32))


def test_padded_sizes() -> None:
    for name in ("tensorwise", "rowwise"):
        config = Float8LinearConfig(**{**vars(CONFIGS[name]), "pad_inner_dim": True})
        layer = Float8Linear(100, 40, device="cuda", dtype=torch.bfloat16, config=config)
        x = torch.randn(24, 100, device="cuda", dtype=torch.bfloat16)
        assert sqnr_db(nn.functional.linear(x, layer.weight, layer.bias), layer(x)) > 18
        layer(x).sum().backward()


def test_autocast() -> None:
    torch._dynamo.reset()
    layer = Float8Linear(256, 128, device="cuda")
    x = torch.randn(32, 256, device="cuda")
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = forward(x)
        assert y.dtype is torch.bfloat16
        y.float().sum().backward()
        assert layer.weight.grad.dtype is torch.float32
