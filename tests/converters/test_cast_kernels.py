"""Float8Linear on the cast kernels: the same bits as on PyTorch's casts, and one cast where one is enough.

Without a GPU the operators are their reference, so this is about who casts what, how often and what is kept.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from converters.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingGranularity,
    ScalingType,
    sync_float8_amax_and_scale_history,
)
from converters.float8.gemm import CPU_HAS_ROW_SCALES

_DELAYED = CastConfig(scaling_type=ScalingType.DELAYED)
_STATIC = CastConfig(scaling_type=ScalingType.STATIC, static_scale=torch.tensor(16.0))
_OFF = CastConfig(scaling_type=ScalingType.DISABLED)
_BY_ROW = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
CONFIGS = {
    "tensorwise": {},
    "power_of_2": {"round_scales_to_power_of_2": True},
    "rowwise": vars(Float8LinearConfig.from_recipe_name("rowwise")),
    "rowwise_with_gw_hp": vars(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")),
    "delayed": dict.fromkeys(
        ("cast_config_input", "cast_config_weight", "cast_config_grad_output"), _DELAYED
    ),
    "static": dict.fromkeys(("cast_config_input", "cast_config_weight"), _STATIC),
    "padded": {"pad_inner_dim": True},
    "emulated": {"emulate": True},
    "two_kinds": {"cast_config_input_for_grad_weight": _BY_ROW, "cast_config_weight_for_grad_input": _BY_ROW},
    "output_in_high_precision": {"cast_config_input": _OFF, "cast_config_weight": _OFF}
    | {
        "cast_config_input_for_grad_weight": CastConfig(),
        "cast_config_weight_for_grad_input": CastConfig(),
    },
}
READS_INPUT_IN_FLOAT8 = [name for name in CONFIGS if name != "rowwise_with_gw_hp"]


def config(name: str, **fields: object) -> Float8LinearConfig:
    return Float8LinearConfig(**{**CONFIGS[name], **fields})


def train(layer: nn.Module, x: Tensor, dy: Tensor, forward: nn.Module | None = None) -> list[Tensor]:
    """Outputs and gradients of two steps."""
    found = []
    for _ in range(2):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = (layer if forward is None else forward)(leaf)
        y.backward(dy.to(y.dtype))
        found += [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]
        if any("amax_history" in name for name, _ in layer.named_buffers()):
            sync_float8_amax_and_scale_history(layer)
    return found


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def as_emulated(got: list[Tensor], want: list[Tensor]) -> bool:
    """Equal but for roundings: some BLAS sums in an order that depends on how its operands lie in memory."""
    roundings = {torch.bfloat16: 2**-8, torch.float32: 1e-6}
    return all(
        a.dtype is b.dtype and torch.allclose(a, b, rtol=2 * roundings[a.dtype], atol=4 * roundings[a.dtype])
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_eager_numbers_are_those_of_the_plain_casts(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    k = 40 if name == "padded" else 64
    layer = Float8Linear(k, 32, dtype=dtype, config=config(name))
    x, dy = torch.randn(*shape, k, dtype=dtype), torch.randn(*shape, 32)
    want = train(layer, x, dy)
    for saved in ("high_precision", "float8") if name in READS_INPUT_IN_FLOAT8 else ("high_precision",):
        other = Float8Linear.from_float(
            nn.Linear(k, 32, dtype=dtype), config(name, cast_kernels="triton", saved_input=saved)
        )
        other.load_state_dict(layer.state_dict())
        assert (as_emulated if name == "emulated" else equal)(train(other, x, dy), want)


@pytest.mark.parametrize("saved", ["high_precision", "float8"])
def test_autocast_frozen_parts_and_no_grad(saved: str) -> None:
    plain = Float8Linear(64, 32)
    layer = copy.deepcopy(plain)
    layer._set_config(Float8LinearConfig(cast_kernels="triton", saved_input=saved))
    x = torch.randn(16, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    for frozen in (False, True):
        results = []
        for each in (plain, layer):
            each.zero_grad()
            each.weight.requires_grad_(not frozen)
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = each(leaf)
            y.sum().backward()  # an expanded gradient
            results.append([y.detach(), leaf.grad, *([] if frozen else [each.weight.grad])])
        assert equal(*results)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """The tensors that autograd saves, by dtype and shape."""

    def __init__(self) -> None:
        self.found: Counter[tuple[torch.dtype, tuple[int, ...]]] = Counter()

        def pack(t: Tensor) -> Tensor:
            if t.dim() == 2:
                self.found[t.dtype, tuple(t.shape)] += 1
            return t

        super().__init__(pack, lambda t: t)


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_what_eager_keeps_of_the_input(name: str) -> None:
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    for saved, of_input in (
        ("high_precision", (torch.bfloat16, (48, 64))),
        ("float8", (torch.float8_e4m3fn, (64, 48))),
    ):
        layer = Float8Linear(64, 32, bias=False, dtype=torch.bfloat16)
        layer._set_config(config(name, cast_kernels="triton", saved_input=saved))
        kept = Kept()
        with kept:
            layer(x)
        scales = {(torch.float32, (64, 1)): 2} if (name, saved) == ("rowwise", "float8") else {}
        assert kept.found == {of_input: 1, (torch.bfloat16, (32, 64)): 1, **scales}


class Calls(TorchDispatchMode):
    """How often each of our operators runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default")
        if name.startswith("octavo"):
            self.found[name.removeprefix("octavo.")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "saved", "forward", "backward"),
    [
        # amax of x, w; x8, w8 | amax of dy; dy8 and dy8ᵀ; w8ᵀ, x8ᵀ
        (
            "tensorwise",
            "high_precision",
            {"amax": 2, "cast_float8": 2},
            {"amax": 1, "cast_both": 1, "cast_transposed": 2},
        ),
        (
            "tensorwise",
            "float8",
            {"amax": 2, "cast_both": 1, "cast_float8": 1},
            {"amax": 1, "cast_both": 1, "cast_transposed": 1},
        ),
        ("rowwise", "high_precision", {"cast_rows": 2}, {"cast_rows_and_columns": 1, "cast_columns": 2}),
        (
            "rowwise",
            "float8",
            {"cast_rows_and_columns": 1, "cast_rows": 1},
            {"cast_rows_and_columns": 1, "cast_columns": 1},
        ),
        (
            "rowwise_with_gw_hp",
            "high_precision",
            {"amax": 1, "cast_rows": 2},
            {"cast_rows": 1, "cast_transposed": 1},
        ),
        (
            "static",
            "float8",
            {"cast_both": 1, "cast_float8": 1},
            {"amax": 1, "cast_both": 1, "cast_transposed": 1},
        ),
    ],
)
def test_casts_of_one_linear(
    name: str, saved: str, forward: dict[str, int], backward: dict[str, int]
) -> None:
    layer = Float8Linear(64, 32, config=config(name, cast_kernels="triton", saved_input=saved))
    x = torch.randn(16, 64, requires_grad=True)
    with Calls() as calls:
        y = layer(x)
    assert calls.found == forward
    with Calls() as calls:
        y.sum().backward()
    assert calls.found == backward


@pytest.mark.parametrize(("name", "saved"), [("delayed", "float8"), ("rowwise", "high_precision")])
def test_compiled_equals_eager(name: str, saved: str) -> None:
    if name == "rowwise" and not CPU_HAS_ROW_SCALES:
        pytest.skip("inductor before torch 2.13 compiles this to wrong values on a CPU")
    torch._dynamo.reset()
    torch.manual_seed(0)
    fields = {"cast_kernels": "triton", "saved_input": saved}
    # Without a bias: a compiler sums its gradient in another order.
    layer = Float8Linear(64, 32, bias=False, config=config(name, **fields))
    x, dy = torch.randn(32, 64), torch.randn(32, 32)
    other = copy.deepcopy(layer)
    assert equal(train(other, x, dy, torch.compile(other, fullgraph=True)), train(layer, x, dy))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cast_kernels": "cuda"}, "cast_kernels is 'cuda'"),
        ({"saved_input": "fp8", "cast_kernels": "triton"}, "saved_input is 'fp8'"),
        ({"saved_input": "float8", "cast_kernels": "torch"}, "needs cast_kernels='triton'"),
        ({**CONFIGS["rowwise_with_gw_hp"], "saved_input": "float8", "cast_kernels": "triton"}, "no effect"),
        ({"saved_input": "least"}, "a config\nof linears knows none"),
        ({"force_recompute_fp8_input_in_bwd": True, "saved_input": "float8"}, "elsewhere it has no effect"),
        ({"force_recompute_fp8_input_in_bwd": True, "cast_kernels": "torch"}, "elsewhere it has no effect"),
        (
            {
                **CONFIGS["rowwise_with_gw_hp"],
                "force_recompute_fp8_input_in_bwd": True,
                "saved_input": "high_precision",
                "cast_kernels": "triton",
            },
            "elsewhere it has no effect",
        ),
        ({"keep_float8_shards": True}, "no effect without enable_fsdp_float8_all_gather"),
    ],
)
def test_settings_without_effect_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Float8LinearConfig(**fields)
