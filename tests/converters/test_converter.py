"""The converter of a run: config section, report, hooks, statistics; and the torch-free imports."""

import logging
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from converters import CONVERTERS, ConverterContext
from converters.config import Float8SectionConfig, QuantizeConfig
from converters.float8 import Float8Converter, Float8Linear
from converters.float8.converter import linear_config

CPU = ConverterContext(device_type="cpu", tokens_per_microbatch=64)


def model() -> nn.ModuleDict:
    torch.manual_seed(0)

    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"wq": nn.Linear(32, 32), "wk": nn.Linear(32, 16), "wv": nn.Linear(32, 16)})

    return nn.ModuleDict(
        {
            "layers": nn.ModuleDict({"0": block(), "1": block()}),
            "output": nn.Linear(32, 48),
            "odd": nn.Linear(32, 7),
        }
    )


def test_names_are_importable_without_torch() -> None:
    code = (
        "import sys, converters, converters.config, converters.float8\n"
        "assert 'torch' not in sys.modules\n"
        "assert converters.CONVERTERS['float8'] is converters.CONVERTERS['quantize.linear.float8']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    import converters.float8 as float8

    for name in float8.__all__:
        assert getattr(float8, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = float8.nope


def test_sections_have_the_documented_defaults() -> None:
    quantize = QuantizeConfig()
    assert quantize.linear.float8 == Float8SectionConfig()
    assert quantize.linear.mx.recipe_name == "mxfp8_cublas"
    assert quantize.linear.mx.filter_fqns == ["output"]
    assert quantize.grouped_mm.mx.recipe_name == "mxfp8"
    assert [f.name for f in fields(Float8SectionConfig)][:5] == [
        "enable_fsdp_float8_all_gather",
        "precompute_float8_dynamic_scale_for_fsdp",
        "recipe_name",
        "filter_fqns",
        "emulate",
    ]


@pytest.mark.parametrize(
    ("settings", "key", "text"),
    [
        (
            {"recipe_name": "rowwise", "enable_fsdp_float8_all_gather": True},
            "enable_fsdp_float8_all_gather",
            "'rowwise'",
        ),
        (
            {"precompute_float8_dynamic_scale_for_fsdp": True},
            "precompute_float8_dynamic_scale_for_fsdp",
            "no effect without",
        ),
        ({"recipe_name": "rowwise", "scaling_type_input": "delayed"}, "scaling_type_input", "dynamic"),
        ({"scaling_type_weight": "static"}, "scaling_type_weight", "static_scale_weight"),
        ({"static_scale_input": 2.0}, "static_scale_input", "no effect"),
        ({"filter_fqns": ["output", " "]}, "filter_fqns", "empty"),
        ({"saved_input": "float8", "cast_kernels": "torch"}, "saved_input", "needs cast_kernels"),
        (
            {"saved_input": "float8", "cast_kernels": "triton", "recipe_name": "rowwise_with_gw_hp"},
            "saved_input",
            "no effect with recipe_name",
        ),
        ({"saved_input": "least", "cast_kernels": "torch"}, "saved_input", "needs cast_kernels"),
        (
            {"saved_input": "least", "recipe_name": "rowwise_with_gw_hp"},
            "saved_input",
            "'least' has no effect with recipe_name",
        ),
        ({"keep_float8_shards": True}, "keep_float8_shards", "no effect without"),
    ],
)
def test_problems(settings: dict[str, object], key: str, text: str) -> None:
    section = Float8SectionConfig(**settings)
    found = dict(section.problems())
    assert key in found
    with pytest.raises(ValueError, match=f"quantize.linear.float8.{key}"):
        CONVERTERS["float8"].build(section, CPU)
    assert text in found[key] or text == "dynamic"


def test_kernel_settings_reach_the_layers(caplog: pytest.LogCaptureFixture) -> None:
    section = Float8SectionConfig(
        cast_kernels="triton",
        saved_input="float8",
        enable_fsdp_float8_all_gather=True,
        keep_float8_shards=True,
    )
    config = linear_config(section)
    assert (config.cast_kernels, config.saved_input, config.keep_float8_shards) == ("triton", "float8", True)
    converter = CONVERTERS["float8"].build(section, CPU)
    assert torch.ops.octavo.cast_both.default in converter.ops_to_save()
    assert "'triton' runs as plain PyTorch here" in caplog.text
    plain = CONVERTERS["float8"].build(
        Float8SectionConfig(cast_kernels="triton", saved_input="high_precision"), CPU
    )
    assert torch.ops.octavo.cast_both.default not in plain.ops_to_save()


@pytest.mark.parametrize(
    ("roles", "compiled", "recast", "warned"),
    [
        ({"*.wq": "columnwise", "*.wo": "rowwise"}, True, ["a.wo", "b.wo"], None),
        ({"*.wq": "columnwise", "*.wo": "rowwise"}, False, ["a.wo", "b.wo"], "without compile.enable"),
        ({"*.wq": "columnwise"}, True, [], "no rowwise linear was converted"),
        ({}, True, [], "no rowwise linear was converted"),
    ],
)
def test_least_goes_by_the_role(
    roles: dict[str, str],
    compiled: bool,
    recast: list[str],
    warned: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layers = {name: nn.ModuleDict({"wq": nn.Linear(32, 32), "wo": nn.Linear(32, 32)}) for name in "ab"}
    model = nn.ModuleDict({**layers, "other": nn.Linear(32, 32)})
    context = replace(CPU, roles=roles, compile_model=compiled)
    converter = CONVERTERS["float8"].build(Float8SectionConfig(saved_input="least"), context)
    caplog.set_level(logging.INFO)
    converter.convert(model)
    configs = {name: m.config for name, m in model.named_modules() if isinstance(m, Float8Linear)}
    assert len(configs) == 5
    assert {config.cast_kernels for config in configs.values()} == {"triton"}
    late = [name for name, config in configs.items() if config.force_recompute_fp8_input_in_bwd]
    assert late == recast
    assert [n for n, config in configs.items() if config.saved_input == "high_precision"] == recast
    assert torch.ops.octavo.cast_both.default in converter.ops_to_save()
    found = [record.message for record in caplog.records if "least" in record.message]
    assert len(found) == (warned is not None)
    assert warned is None or warned in found[0]


def test_explicit_tensorwise_with_all_gather_is_accepted() -> None:
    section = Float8SectionConfig(recipe_name="tensorwise", enable_fsdp_float8_all_gather=True)
    assert not list(section.problems())
    assert linear_config(section).enable_fsdp_float8_all_gather


def test_report_rows_and_reasons() -> None:
    converter = Float8Converter(Float8SectionConfig(filter_fqns=["output", "wv"]), CPU)
    m = model()
    report = converter.convert(m)
    assert report.summary() == "float8: converted 4 of 8 linears (52 % of linear FLOPs)"
    rows = {row.fqn: row for row in report.rows}
    assert rows["layers.*.wq"].count == 2
    assert rows["layers.*.wq"].local_mkn == (64, 32, 32)
    assert rows["layers.*.wk"].converted
    assert rows["layers.*.wv"].reason == "filter_fqns has 'wv'"
    assert rows["odd"].reason == "N = 7 not divisible by 16; pad_inner_dim pads"
    assert isinstance(m["layers"]["0"]["wq"], Float8Linear)


def test_report_folds_equal_shapes_and_shows_local_ones() -> None:
    context = ConverterContext(
        device_type="cuda",
        tokens_per_microbatch=8192,
        tp_degree=2,
        compile_model=True,
        roles={"layers.*.wk": "columnwise", "layers.*.wv": "columnwise", "output": "rowwise"},
    )
    section = Float8SectionConfig(filter_fqns=["odd"], emulate=True)
    report = Float8Converter(section, context).convert(model())
    rows = {row.fqn: row for row in report.rows}
    assert rows["layers.*.{wk,wv}"].count == 4
    assert rows["layers.*.{wk,wv}"].local_mkn == (8192, 32, 8)
    assert rows["output"].local_mkn == (8192, 16, 48)


@pytest.mark.parametrize(
    ("compiled", "kernels", "losing"),
    [(False, "torch", {"a.{wk,wv}"}), (True, "torch", set()), (False, "triton", set())],
)
def test_small_layers_lose_unless_a_sibling_casts_their_input(
    compiled: bool, kernels: str, losing: set[str]
) -> None:
    widths = {"wq": 4096, "wk": 1024, "wv": 1024}
    with torch.device("meta"):
        layers = nn.ModuleDict({name: nn.Linear(4096, n) for name, n in widths.items()})
    context = ConverterContext(
        device_type="cuda",
        tokens_per_microbatch=8192,
        compile_model=compiled,
        roles={f"a.{name}": "columnwise" for name in widths},
    )
    section = Float8SectionConfig(cast_kernels=kernels)
    report = CONVERTERS["float8"].build(section, context).convert(nn.ModuleDict({"a": layers}))
    found = {row.fqn for row in report.rows if "expected to lose" in row.reason}
    assert found == losing


def test_nothing_converted_cannot_be_missed(caplog: pytest.LogCaptureFixture) -> None:
    converter = Float8Converter(Float8SectionConfig(filter_fqns=["auto_filter_small_kn"]), CPU)
    with caplog.at_level(logging.WARNING):
        report = converter.convert(model())
    assert report.converted == 0
    assert "NOTHING WAS CONVERTED" in caplog.text


def test_unmatched_filter_is_an_error() -> None:
    converter = Float8Converter(Float8SectionConfig(filter_fqns=["outptu"]), CPU)
    with pytest.raises(ValueError, match=r"'outptu' \(nearest: 'output'\)"):
        converter.convert(model())


def test_eager_on_a_gpu_warns(caplog: pytest.LogCaptureFixture) -> None:
    context = ConverterContext(device_type="cuda", tokens_per_microbatch=64)
    with caplog.at_level(logging.WARNING):
        Float8Converter(Float8SectionConfig(emulate=True), context)
    assert "compile.enable" in caplog.text


def train_step(converter: Float8Converter, m: nn.ModuleDict, step: int) -> None:
    converter.before_step(m, step)
    layer = m["layers"]["0"]
    (layer["wq"](torch.randn(8, 32)).sum() + layer["wk"](torch.randn(8, 32)).sum()).backward()
    converter.after_backward(m)
    converter.after_optimizer_step(m)


def test_delayed_sync_is_automatic_and_state_round_trips() -> None:
    kinds = {f"scaling_type_{t}": "delayed" for t in ("input", "weight", "grad_output")}
    section = Float8SectionConfig(filter_fqns=["odd", "output"], delayed_history_len=4, **kinds)
    converter, m = Float8Converter(section, CPU), model()
    converter.convert(m)
    train_step(converter, m, 1)
    layer = m["layers"]["0"]["wq"]
    assert layer.float8_scale_input.item() > 0
    state = converter.state_dict(m)
    assert state["layers.0.wq.amax_history"].shape == (3, 4)
    assert not set(m.state_dict()) & set(state)
    fresh = model()
    converter.convert(fresh)
    converter.load_state_dict(fresh, state)
    assert torch.equal(fresh["layers"]["0"]["wq"].float8_amax_history, layer.float8_amax_history)
    plain = Float8Converter(Float8SectionConfig(filter_fqns=["odd"]), CPU)
    m2 = model()
    plain.convert(m2)
    assert plain.state_dict(m2) == {}
    plain.load_state_dict(m2, {})


def test_statistics_on_logged_steps_only() -> None:
    section = Float8SectionConfig(filter_fqns=["odd", "output"], log_stats_freq=3)
    converter, m = Float8Converter(section, CPU), model()
    converter.convert(m)
    logged = []
    for step in range(1, 5):
        train_step(converter, m, step)
        tags = converter.metrics(m)
        logged.append(bool(tags))
        if step == 3:
            weight = m["layers"]["0"]["wq"].weight
            assert tags["float8/layers.0.wq/weight/amax"] == weight.abs().max().item()
            assert tags["float8/layers.0.wq/grad_output/amax"] == 1.0
            assert 25 < tags["float8/layers.0.wq/input/sqnr_db"] < 40
            assert tags["float8/layers.0.wq/input/saturated_share"] == 0.0
            assert "float8/layers.1.wq/input/amax" not in tags  # not used in this step
            assert tags["float8/worst/input/sqnr_db"] <= tags["float8/layers.0.wq/input/sqnr_db"]
    assert logged == [True, False, True, False]


def test_statistics_by_hand() -> None:
    from converters.float8.stats import health

    x = torch.tensor([1000.0, 1.0, 2.0**-12, 0.0])
    amax, saturated, flushed, sqnr = health(x, torch.tensor(1.0), torch.float8_e4m3fn).tolist()
    assert (amax, saturated, flushed) == (1000.0, 0.25, 0.25)
    want = 10 * torch.log10(torch.tensor((1000.0**2 + 1) / ((1000.0 - 448.0) ** 2))).item()
    assert sqnr == pytest.approx(want, abs=1e-3)
