"""Float8Linear: accuracy, the three GEMMs by hand, edges, and the nn.Linear contract."""

import copy
import math

import pytest
import torch
from torch import nn

from converters.float8 import CastConfig, Float8Linear, Float8LinearConfig, ScalingType
from converters.float8.scaling import cast_to_float8, compute_amax, dequantize, scale_from_amax

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def delayed_config() -> Float8LinearConfig:
    cast = CastConfig(scaling_type=ScalingType.DELAYED)
    return Float8LinearConfig(cast_config_input=cast, cast_config_weight=cast, cast_config_grad_output=cast)


def sqnr_db(want: torch.Tensor, got: torch.Tensor) -> float:
    want, got = want.double(), got.double()
    noise = (want - got).square().sum()
    return (10 * torch.log10(want.square().sum() / noise)).item() if noise > 0 else math.inf


def config_of(name: str) -> Float8LinearConfig:
    return delayed_config() if name == "delayed" else Float8LinearConfig.from_recipe_name(name)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*RECIPES, "delayed"])
def test_accuracy(name: str, dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 128, dtype=dtype)
    reference = nn.Linear(256, 128)
    reference.load_state_dict({k: v.float() for k, v in linear.state_dict().items()})
    layer = Float8Linear.from_float(linear, config_of(name))
    x = torch.randn(*((96,) if rank == 2 else (3, 32)), 256, dtype=dtype, requires_grad=True)
    x_ref = x.detach().float().requires_grad_()
    dy = torch.randn(*x.shape[:-1], 128).to(dtype)
    y, y_ref = layer(x), reference(x_ref)
    y.backward(dy)
    y_ref.backward(dy.float())
    assert y.dtype is dtype
    assert y.shape == y_ref.shape
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is dtype
    assert x.grad is not None
    assert sqnr_db(y_ref, y) >= 18
    assert sqnr_db(x_ref.grad, x.grad) >= 18
    assert sqnr_db(reference.weight.grad, layer.weight.grad) >= 17
    assert sqnr_db(reference.bias.grad, layer.bias.grad) >= 40


def quantized(t: torch.Tensor, dtype: torch.dtype, dim: int | None, pow2: bool) -> torch.Tensor:
    scale = scale_from_amax(compute_amax(t, dim), dtype, pow2)
    return dequantize(cast_to_float8(t, scale, dtype), scale)


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_gemms_are_the_recipes_equations(name: str, emulate: bool) -> None:
    """Each GEMM against the recipe table, written out once more."""
    torch.manual_seed(1)
    config = Float8LinearConfig.from_recipe_name(name)
    config = Float8LinearConfig(**{**vars(config), "emulate": emulate})
    layer = Float8Linear(64, 32, bias=False, config=config)
    w, x, dy = layer.weight.detach(), torch.randn(48, 64, requires_grad=True), torch.randn(48, 32)
    y = layer(x)
    y.backward(dy)
    x_data = x.detach()
    if name == "tensorwise":
        xq, wq, dyq = (quantized(t, d, None, False) for t, d in ((x_data, E4M3), (w, E4M3), (dy, E5M2)))
        want = (xq @ wq.t(), dyq @ wq, dyq.t() @ xq)
    else:
        out = quantized(x_data, E4M3, 1, True) @ quantized(w, E4M3, 1, True).t()
        gw_hp = name == "rowwise_with_gw_hp"
        grad_input = quantized(dy, E4M3, 1, True) @ quantized(w, E4M3, None if gw_hp else 0, True)
        if gw_hp:
            grad_weight = dy.t() @ x_data
        else:
            grad_weight = quantized(dy, E4M3, 0, True).t() @ quantized(x_data, E4M3, 0, True)
        want = (out, grad_input, grad_weight)
    for got, expected in zip((y, x.grad, layer.weight.grad), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_real_gemms_agree_with_emulation(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    config = Float8LinearConfig.from_recipe_name(name)
    real = Float8Linear(128, 64, dtype=dtype, config=config)
    emulated = Float8Linear.from_float(real, Float8LinearConfig(**{**vars(config), "emulate": True}))
    x = torch.randn(40, 128, dtype=dtype)
    results = []
    for layer in (real, emulated):
        real.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), layer.weight.grad.clone()))
    enough = 100 if dtype is torch.float32 else 45
    for a, b in zip(*results, strict=True):
        assert sqnr_db(a, b) > enough


@pytest.mark.parametrize("name", [*RECIPES, "delayed"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty_input(name: str, shape: tuple[int, ...]) -> None:
    layer = Float8Linear(64, 32, config=config_of(name))
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 32)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("name", [*RECIPES, "delayed"])
def test_zero_input_gives_the_bias_and_zero_gradients(name: str) -> None:
    layer = Float8Linear(64, 32, config=config_of(name))
    y = layer(torch.zeros(4, 64))
    assert torch.equal(y, layer.bias.detach().expand(4, 32))
    (y * 0).sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", RECIPES)
def test_bad_values_stay_visible(name: str, bad: float) -> None:
    layer = Float8Linear(64, 32, bias=False, config=config_of(name))
    x = torch.randn(16, 64)
    x[3, 5] = bad
    y = layer(x)
    assert not y[3].isfinite().any()
    if name != "tensorwise":  # scales per row keep the other rows whole
        assert y[4].isfinite().all()


@pytest.mark.parametrize("m", [1, 7, 17])
@pytest.mark.parametrize("name", RECIPES)
def test_any_number_of_rows(name: str, m: int) -> None:
    """grad_weight contracts over M, which need not be divisible by 16."""
    torch.manual_seed(3)
    layer = Float8Linear(64, 32, bias=False, config=config_of(name))
    x, dy = torch.randn(m, 64), torch.randn(m, 32)
    layer(x).backward(dy)
    assert sqnr_db(dy.t() @ x, layer.weight.grad) >= 17


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("k", "n"), [(20, 32), (32, 20), (13, 7)])
def test_padded_sizes(name: str, k: int, n: int) -> None:
    torch.manual_seed(4)
    config = Float8LinearConfig(**{**vars(config_of(name)), "pad_inner_dim": True})
    layer = Float8Linear(k, n, config=config)
    x = torch.randn(24, k, requires_grad=True)
    dy = torch.randn(24, n)
    y = layer(x)
    y.backward(dy)
    assert y.shape == (24, n)
    assert sqnr_db(nn.functional.linear(x, layer.weight, layer.bias).detach(), y) >= 18
    assert sqnr_db(dy @ layer.weight.detach(), x.grad) >= 18
    assert sqnr_db(dy.t() @ x.detach(), layer.weight.grad) >= 17


def test_rank_one_and_four() -> None:
    layer = Float8Linear(32, 16)
    assert layer(torch.randn(32)).shape == (16,)
    assert layer(torch.randn(2, 3, 4, 32)).shape == (2, 3, 4, 16)


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="last dim 32, expected 64"):
        Float8Linear(64, 16)(torch.randn(4, 32))


def test_expanded_gradient() -> None:
    layer = Float8Linear(32, 16)
    x = torch.randn(8, 32, requires_grad=True)
    layer(x).sum().backward()
    want = layer.weight.detach().sum(0).expand(8, 32)
    assert sqnr_db(want, x.grad) >= 18


def test_frozen_weight_or_input() -> None:
    layer = Float8Linear(32, 16, bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


@pytest.mark.parametrize("name", RECIPES)
def test_autocast(name: str) -> None:
    """Under autocast a layer computes what its bf16 copy computes; gradients reach fp32 parameters."""
    torch.manual_seed(5)
    layer = Float8Linear(64, 32, config=config_of(name))
    low = copy.deepcopy(layer).to(torch.bfloat16)
    x = torch.randn(16, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y_low = low(x.to(torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, y_low)
    y.float().sum().backward()
    y_low.float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    assert torch.equal(layer.weight.grad, low.weight.grad.float())


def test_gradient_accumulation_adds() -> None:
    torch.manual_seed(6)
    layer = Float8Linear(32, 16, bias=False)
    xs = torch.randn(2, 8, 32)
    grads = []
    for x in xs:
        layer.zero_grad()
        layer(x).sum().backward()
        grads.append(layer.weight.grad.clone())
    layer.zero_grad()
    for x in xs:
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, grads[0] + grads[1])


def test_static_scales_are_used_and_never_change() -> None:
    def static(scale: float) -> CastConfig:
        return CastConfig(scaling_type=ScalingType.STATIC, static_scale=torch.tensor(scale))

    config = Float8LinearConfig(
        cast_config_input=static(2.0), cast_config_weight=static(4.0), cast_config_grad_output=static(8.0)
    )
    layer = Float8Linear(16, 16, bias=False, config=config)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.full((4, 16), 1000.0)  # saturates at 448 / 2
    y = layer(x)
    assert torch.equal(y, torch.full((4, 16), 16 * 224.0))
    y.backward(torch.full((4, 16), 10000.0))  # saturates at 57344 / 8
    assert torch.equal(layer.weight.grad, torch.full((16, 16), 4 * 224.0 * 7168.0))
    assert layer.float8_static_cast_config_input.item() == 2.0
    assert set(layer.state_dict()) == {"weight"}


def test_state_survives_meta_and_dtype_moves() -> None:
    config = Float8LinearConfig(
        cast_config_weight=CastConfig(scaling_type=ScalingType.STATIC, static_scale=torch.tensor(4.0)),
        cast_config_input=CastConfig(scaling_type=ScalingType.DELAYED),
    )
    with torch.device("meta"):
        layer = Float8Linear.from_float(nn.Linear(16, 16), config)
    layer.to_empty(device="cpu")
    assert layer.float8_static_cast_config_weight.item() == 4.0
    assert not layer.float8_amax_history.any()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.float8_amax_history.dtype is torch.float32


def test_repr_shows_the_casts() -> None:
    text = repr(Float8Linear(32, 16, config=config_of("rowwise_with_gw_hp")))
    assert "i:dyn_axs_e4m3|hp, w:dyn_axs_e4m3|dyn_ten_e4m3, go:dyn_axs_e4m3|hp" in text
    assert "i:dyn_ten_e4m3, w:dyn_ten_e4m3, go:dyn_ten_e5m2" in repr(Float8Linear(32, 16))


@pytest.mark.parametrize("name", [*RECIPES, "delayed"])
def test_two_forwards_then_two_backwards(name: str) -> None:
    """A pipeline schedule holds several forwards open."""
    layer = Float8Linear(32, 16, config=config_of(name))
    first, second = layer(torch.randn(4, 32)), layer(torch.randn(4, 32))
    first.sum().backward()
    second.sum().backward()
    assert layer.weight.grad.isfinite().all()
