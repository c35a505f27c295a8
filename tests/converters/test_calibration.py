"""A calibration file decides which linears become float8, and is refused where it does not apply."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from converters.base import ConverterContext
from converters.config import Float8SectionConfig
from converters.float8 import auto_filter_for_recipe
from converters.float8.calibration import Calibration, ShapeTiming, read_calibration, speed_settings
from converters.float8.converter import Float8Converter

CPU = ConverterContext(device_type="cpu", tokens_per_microbatch=64)
GAINS = ShapeTiming(64, 32, 48, high_precision_us=30.0, float8_us=20.0, convert=True, fqn="a", count=1)
LOSES = ShapeTiming(64, 32, 16, high_precision_us=8.0, float8_us=10.0, convert=False, fqn="b", count=2)
MADE = Calibration("cpu", "tensorwise", False, "bfloat16", {}, (GAINS, LOSES), {"torch": torch.__version__})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deep" / "calibration.json"
    MADE.write(path)
    return path


def model(**more):
    with torch.device("meta"):
        return nn.ModuleDict({"big": nn.Linear(32, 48), "small": nn.Linear(32, 16), **more})


def section(file, **settings):
    return Float8SectionConfig(calibration=str(file), **settings)


def test_the_file_comes_back_as_it_was(file):
    assert read_calibration(file) == MADE
    assert json.loads(file.read_text())["shapes"][0]["speedup"] == 1.5
    assert MADE.find((64, 32, 16)) is LOSES
    assert MADE.find((64, 16, 32)) is None


def test_the_measured_shapes_decide(file):
    report = Float8Converter(section(file), CPU).convert(model())
    rows = {row.fqn: row for row in report.rows}
    assert rows["big"].converted
    assert rows["big"].reason == "calibration: 1.50x of bf16's speed"
    assert not rows["small"].converted
    assert rows["small"].reason == "calibration: 0.80x of bf16's speed"


def test_what_the_file_says_counts_though_edited(file):
    found = json.loads(file.read_text())
    found["shapes"][1]["convert"] = True
    file.write_text(json.dumps(found))
    assert Float8Converter(section(file), CPU).convert(model()).converted == 2


def test_shapes_are_those_of_one_device(tmp_path):
    """Under tensor parallelism N of a columnwise linear is a part of the whole."""
    path = tmp_path / "tp.json"
    dataclasses.replace(MADE, shapes=(dataclasses.replace(GAINS, n=24), LOSES)).write(path)
    context = dataclasses.replace(CPU, tp_degree=2, roles={"big": "columnwise"})
    assert Float8Converter(section(path), context).convert(model()).converted == 1


def test_a_shape_that_it_lacks_is_an_error_unless_filtered(file):
    more = {"new": nn.Linear(64, 64, device="meta"), "odd": nn.Linear(7, 7, device="meta")}
    with pytest.raises(ValueError, match=r"lacks \(M, K, N\) = \(64, 64, 64\) of new;") as raised:
        Float8Converter(section(file), CPU).convert(model(**more))
    assert "odd" not in str(raised.value)  # it could not be converted in any case
    report = Float8Converter(section(file, filter_fqns=["new"]), CPU).convert(model(**more))
    assert report.converted == 1


@pytest.mark.parametrize(
    ("change", "context", "settings", "expected"),
    [
        ({"recipe": "rowwise"}, CPU, {}, "was made for recipe 'rowwise', this run has 'tensorwise'"),
        ({"device": "NVIDIA H200"}, CPU, {}, "was made on 'NVIDIA H200', this run is on 'cpu'"),
        ({}, CPU, {"filter_fqns": ["auto_filter_small_kn"]}, "auto_filter_small_kn guesses"),
        ({}, CPU, {"emulate": True}, "emulate does without"),
    ],
)
def test_it_is_refused_where_it_does_not_apply(tmp_path, change, context, settings, expected):
    path = tmp_path / "other.json"
    dataclasses.replace(MADE, **change).write(path)
    with pytest.raises(ValueError, match=expected):
        Float8Converter(section(path, **settings), context)


def test_a_dry_run_does_not_ask_for_the_device(tmp_path):
    path = tmp_path / "h200.json"
    dataclasses.replace(MADE, device="NVIDIA H200").write(path)
    context = dataclasses.replace(CPU, dry_run=True)
    assert Float8Converter(section(path), context).convert(model()).converted == 1


def test_other_settings_than_it_was_made_with_are_a_warning(file, caplog):
    Float8Converter(section(file, round_scales_to_power_of_2=True), CPU)
    assert "was made with {'compiled': False}, this run has" in caplog.text
    caplog.clear()
    Float8Converter(section(file, filter_fqns=["big"]), CPU)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "is no 'octavo float8 calibration 1'"),
        ('{"format": "octavo float8 calibration 1"}', "lacks a part"),
        (
            '{"format": "octavo float8 calibration 1", "device": "cpu", "recipe": "rowwise", "compiled": 1, '
            '"dtype": "bfloat16", "settings": {}, "shapes": []}',
            "compiled is 1, expected a bool",
        ),
        (
            '{"format": "octavo float8 calibration 1", "shapes": [{"m": 0, "k": 1, "n": 1, '
            '"high_precision_us": 1, "float8_us": 1, "convert": true}]}',
            "a shape has sizes",
        ),
    ],
)
def test_files_that_are_none(tmp_path, text, expected):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_calibration(path)
    with pytest.raises(ValueError, match="No such file"):
        read_calibration(tmp_path / "absent.json")


def test_settings_that_bear_on_a_linears_time():
    assert speed_settings(Float8SectionConfig()) == {}
    changed = Float8SectionConfig(pad_inner_dim=True, filter_fqns=["x"], enable_fsdp_float8_all_gather=True)
    assert speed_settings(changed) == {"pad_inner_dim": True}


def test_as_a_library():
    chosen = auto_filter_for_recipe(
        "tensorwise", [], calibration=MADE, local_sizes=lambda fqn, k, n: (64, k, n)
    )
    assert chosen(nn.Linear(32, 48, device="meta"), "x")
    assert not chosen(nn.Linear(32, 16, device="meta"), "x")
    with pytest.raises(ValueError, match="local_sizes"):
        auto_filter_for_recipe("tensorwise", [], calibration=MADE)
