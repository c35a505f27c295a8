"""The swap, the filters with their known answers, saving and loading."""

import io

import pytest
import torch
from torch import nn

from converters.float8 import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
    auto_filter_for_recipe,
    convert_to_float8_training,
)
from converters.float8.gemm import unsupported_reason


def test_swap_is_in_place_and_keeps_parameters() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 16)), nn.Linear(16, 5))
    params, keys = list(model.parameters()), list(model.state_dict())
    model[0].register_forward_hook(lambda module, args, out: out + 1)
    model.eval()
    assert convert_to_float8_training(model) is model
    assert [type(m).__name__ for m in (model[0], model[1][0], model[2])] == ["Float8Linear"] * 2 + ["Linear"]
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert all(type(v) is torch.Tensor for v in model.state_dict().values())
    assert not model[0].training
    assert len(model[0]._forward_hooks) == 1


def test_root_linear_is_returned() -> None:
    linear = nn.Linear(16, 16)
    new = convert_to_float8_training(linear)
    assert isinstance(new, Float8Linear)
    assert new.weight is linear.weight


def test_shared_linear_stays_shared() -> None:
    shared = nn.Linear(16, 16)
    model = convert_to_float8_training(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert isinstance(model["a"], Float8Linear)
    assert model["a"] is model["b"][0]


def test_filter_fn_and_subclasses() -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict({"keep": nn.Linear(16, 16), "mine": MyLinear(16, 16), "go": nn.Linear(16, 16)})
    convert_to_float8_training(model, module_filter_fn=lambda module, fqn: fqn != "keep")
    assert [type(m).__name__ for m in model.values()] == ["Linear", "MyLinear", "Float8Linear"]
    assert "go" in repr(model)


def test_nothing_converted_warns() -> None:
    with pytest.warns(UserWarning, match="converted nothing: K = 3 and N = 5 not divisible by 16"):
        convert_to_float8_training(nn.Linear(3, 5))


def test_meta_model() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    assert isinstance(convert_to_float8_training(model)[0], Float8Linear)


LLAMA3 = {  # dim, layers, kv dim, hidden
    "1B": (2048, 16, 512, 8192),
    "8B": (4096, 32, 1024, 14336),
    "70B": (8192, 80, 1024, 28672),
    "405B": (16384, 126, 1024, 53248),
}


def llama(size: str) -> nn.Module:
    dim, layers, kv, hidden = LLAMA3[size]

    def linear(k: int, n: int) -> nn.Linear:
        return nn.Linear(k, n, bias=False, device="meta")

    def block() -> nn.Module:
        attention = {
            "wq": linear(dim, dim),
            "wk": linear(dim, kv),
            "wv": linear(dim, kv),
            "wo": linear(dim, dim),
        }
        feed_forward = {"w1": linear(dim, hidden), "w2": linear(hidden, dim), "w3": linear(dim, hidden)}
        return nn.ModuleDict(
            {"attention": nn.ModuleDict(attention), "feed_forward": nn.ModuleDict(feed_forward)}
        )

    return nn.ModuleDict(
        {"layers": nn.ModuleDict({str(i): block() for i in range(layers)}), "output": linear(dim, 128256)}
    )


@pytest.mark.parametrize(
    ("size", "recipe", "count", "skipped"),
    [
        ("8B", "tensorwise", 160, {"wk", "wv"}),
        ("8B", "rowwise", 160, {"wk", "wv"}),
        ("8B", "rowwise_with_gw_hp", 160, {"wk", "wv"}),
        ("70B", "tensorwise", 560, set()),
        ("70B", "rowwise", 400, {"wk", "wv"}),
        ("405B", "tensorwise", 882, set()),
        ("1B", "rowwise", 32, {"wq", "wk", "wv", "wo", "w2"}),
    ],
)
def test_known_answers_of_the_auto_filter(size: str, recipe: str, count: int, skipped: set[str]) -> None:
    model = llama(size)
    chosen = auto_filter_for_recipe(recipe, ["output", "auto_filter_small_kn"])
    convert_to_float8_training(model, module_filter_fn=chosen)
    kinds = {fqn: type(m) for fqn, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert sum(kind is Float8Linear for kind in kinds.values()) == count
    assert {fqn.rpartition(".")[2] for fqn, kind in kinds.items() if kind is nn.Linear} == skipped | {
        "output"
    }


@pytest.mark.parametrize(
    ("recipe", "k", "n", "small"),
    [
        ("tensorwise", 4096, 1024, True),
        ("tensorwise", 4112, 1024, False),
        ("tensorwise", 4096, 1040, False),
        ("rowwise", 65536, 2048, True),
        ("rowwise", 1024, 65536, True),
        ("rowwise", 2048, 4096, True),
        ("rowwise", 2064, 4096, False),
        ("rowwise", 2048, 4112, False),
    ],
)
def test_thresholds_are_inclusive(recipe: str, k: int, n: int, small: bool) -> None:
    linear = nn.Linear(k, n, device="meta")
    assert auto_filter_for_recipe(recipe, ["auto_filter_small_kn"])(linear, "w") is not small
    assert auto_filter_for_recipe(recipe, [])(linear, "w")


def test_unmatched_filter_names_the_nearest() -> None:
    chosen = auto_filter_for_recipe("tensorwise", ["attention.wkk", "output"])
    with pytest.raises(ValueError, match=r"'attention.wkk' \(nearest: 'attention.wk'\)") as error:
        convert_to_float8_training(llama("1B"), module_filter_fn=chosen)
    assert "'output'" not in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_checkpoints_load_both_ways_and_training_goes_on() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).to(torch.bfloat16)
    float8 = convert_to_float8_training(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).to(torch.bfloat16)
    )
    float8.load_state_dict(plain.state_dict())
    assert torch.equal(float8[0].weight, plain[0].weight)
    with torch.no_grad():
        float8[0].weight.mul_(2)
    buffer = io.BytesIO()
    torch.save(float8.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(float8[0].weight, plain[0].weight)
    whole = io.BytesIO()
    torch.save(float8, whole)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    assert torch.equal(again(x), float8(x))
    again(x).sum().backward()
    assert again[0].weight.grad is not None


def lines_of(error: pytest.ExceptionInfo[ValueError]) -> int:
    return len(str(error.value).splitlines())


DISABLED = CastConfig(scaling_type=ScalingType.DISABLED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cast_config_input": DISABLED, "cast_config_input_for_grad_weight": CastConfig()},
            "the output GEMM",
        ),
        ({"cast_config_weight_for_grad_input": DISABLED}, "the grad_input GEMM"),
        ({"cast_config_input_for_grad_weight": DISABLED}, "the grad_weight GEMM"),
        (
            {
                "enable_fsdp_float8_all_gather": True,
                "cast_config_weight": CastConfig(scaling_granularity=ScalingGranularity.AXISWISE),
            },
            "one gathered float8 copy",
        ),
        ({"cast_config_weight": CastConfig(target_dtype=torch.float8_e5m2)}, "e5m2 by e5m2"),
    ],
)
def test_bad_configs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Float8LinearConfig(**fields)
    assert lines_of(error) <= 3


def test_bad_cast_configs() -> None:
    axiswise = ScalingGranularity.AXISWISE
    with pytest.raises(ValueError, match="AXISWISE granularity needs scaling_type DYNAMIC, got DELAYED"):
        CastConfig(scaling_type=ScalingType.DELAYED, scaling_granularity=axiswise)
    with pytest.raises(ValueError, match="needs static_scale"):
        CastConfig(scaling_type=ScalingType.STATIC)
    with pytest.raises(ValueError, match="static_scale has no effect"):
        CastConfig(static_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"target_dtype is torch.bfloat16"):
        CastConfig(target_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="did you mean 'rowwise'"):
        Float8LinearConfig.from_recipe_name("row_wise")


def test_defaults_are_resolved_into_copies() -> None:
    mine = CastConfig()
    config = Float8LinearConfig(cast_config_grad_output=mine, cast_config_input=mine)
    assert mine.target_dtype is None
    assert config.cast_config_grad_output.target_dtype is torch.float8_e5m2
    assert config.cast_config_input_for_grad_weight == config.cast_config_input
    assert config.cast_config_input.target_dtype is torch.float8_e4m3fn


def test_recipes_by_name_and_enum_follow_the_table() -> None:
    for name in Float8LinearRecipeName:
        assert Float8LinearConfig.from_recipe_name(name) == Float8LinearConfig.from_recipe_name(name.value)
    tensorwise = Float8LinearConfig.from_recipe_name("tensorwise")
    assert tensorwise == Float8LinearConfig()
    assert not tensorwise.round_scales_to_power_of_2
    rowwise = Float8LinearConfig.from_recipe_name("rowwise")
    assert rowwise.round_scales_to_power_of_2
    assert rowwise.cast_config_grad_output.short() == "dyn_axs_e4m3"
    for config in (tensorwise, rowwise):
        gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
        assert [gemm.use_fast_accum for gemm in gemms] == [True, False, False]


def test_old_gpu_is_told_to_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Old GPU")
    unsupported_reason.cache_clear()
    from converters.float8.gemm import check_device

    check_device("cuda", 0, axiswise=False, emulate=False)
    check_device("cuda", 0, axiswise=True, emulate=True)
    with pytest.raises(
        ValueError, match=r"need compute capability 9.0, Old GPU has 8.9.\nSet emulate = true"
    ):
        check_device("cuda", 0, axiswise=True, emulate=False)
    with pytest.raises(ValueError, match="emulate"):
        check_device("mps", None, axiswise=False, emulate=False)
    unsupported_reason.cache_clear()
