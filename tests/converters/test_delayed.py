"""Delayed scaling: a true window, its first use, its sync and its state."""

import warnings

import pytest
import torch
from torch import nn

from converters.float8 import (
    CastConfig,
    DelayedScalingConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    sync_float8_amax_and_scale_history,
)
from converters.float8.delayed import delayed_state_dict, load_delayed_state_dict


def config(history_len: int = 16) -> Float8LinearConfig:
    cast = CastConfig(scaling_type=ScalingType.DELAYED)
    return Float8LinearConfig(
        cast_config_input=cast,
        cast_config_weight=cast,
        cast_config_grad_output=cast,
        delayed_scaling_config=DelayedScalingConfig(history_len=history_len),
    )


def step(layer: nn.Module, amax: float) -> None:
    x = torch.full((4, 16), amax)
    layer(x).sum().backward()
    sync_float8_amax_and_scale_history(layer)


@pytest.mark.parametrize("history_len", [1, 3, 16])
def test_a_spike_leaves_after_exactly_history_len_steps(history_len: int) -> None:
    layer = Float8Linear(16, 16, config=config(history_len))
    step(layer, 2.0)
    step(layer, 100.0)
    for age in range(history_len):
        assert layer.float8_scale_input.item() == pytest.approx(4.48), f"{age} steps after the spike's"
        step(layer, 2.0)
    assert layer.float8_scale_input.item() == 224.0


def test_first_step_is_dynamic_and_later_ones_saturate() -> None:
    torch.manual_seed(0)
    delayed = Float8Linear(16, 16, bias=False, config=config())
    dynamic = Float8Linear.from_float(delayed, Float8LinearConfig())
    x = torch.randn(4, 16)
    assert torch.equal(delayed(x), dynamic(x))
    assert torch.equal(delayed(2 * x), dynamic(2 * x))  # a second micro-batch of the first step
    delayed(x).sum().backward()
    sync_float8_amax_and_scale_history(delayed)
    assert layer_amax(delayed) == 2 * x.abs().max().item()
    # Twice the window's largest value is clipped to the window's largest value.
    big = torch.full((1, 16), 4 * x.abs().max().item())
    clipped = torch.full((1, 16), 2 * x.abs().max().item())
    assert torch.equal(delayed(big), delayed(clipped))


def layer_amax(layer: Float8Linear) -> float:
    return layer.float8_amax_history[0, 0].item()


def test_the_largest_of_the_micro_batches_counts() -> None:
    layer = Float8Linear(16, 16, config=config())
    for amax in (1.0, 7.0, 3.0):
        layer(torch.full((2, 16), amax)).sum().backward()
    sync_float8_amax_and_scale_history(layer)
    assert layer.float8_amax_history[:, 0].tolist() == [7.0, layer.weight.abs().max().item(), 1.0]
    assert layer.float8_scale_grad_output.item() == 57344.0
    assert layer.float8_amax_input.item() == 0.0


def test_bad_and_zero_amaxes_do_not_spoil_the_scale() -> None:
    layer = Float8Linear(16, 16, config=config())
    step(layer, 0.0)
    assert layer.float8_scale_input.item() == 0.0  # none yet: the next use is dynamic
    step(layer, 2.0)
    step(layer, float("inf"))
    assert layer.float8_scale_input.item() == 224.0
    assert layer.float8_amax_history[0, :3].tolist() == [0.0, 2.0, 0.0]


def test_evaluation_records_nothing() -> None:
    layer = Float8Linear(16, 16, config=config()).eval()
    layer(torch.ones(2, 16))
    assert layer.float8_amax_input.item() == 0.0


def test_state_is_outside_the_model_and_resumes_exactly() -> None:
    torch.manual_seed(1)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), config=config(4))
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    xs = torch.randn(6, 8, 16)

    def run(m: nn.Module, batches: torch.Tensor) -> torch.Tensor:
        for x in batches:
            y = m(x)
            y.square().sum().backward()
            sync_float8_amax_and_scale_history(m)
        return y.detach()

    run(model, xs[:3])
    state = {k: v.clone() for k, v in delayed_state_dict(model).items()}
    resumed = convert_to_float8_training(
        nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), config=config(4)
    )
    resumed.load_state_dict(model.state_dict())
    load_delayed_state_dict(resumed, state)
    assert torch.equal(run(model, xs[3:]), run(resumed, xs[3:]))
    with pytest.raises(ValueError, match="history has shape"):
        load_delayed_state_dict(
            resumed, {k: v[..., :2] if k.endswith("history") else v for k, v in state.items()}
        )
    with pytest.raises(ValueError, match="does not fit"):
        load_delayed_state_dict(model, {"else.amax": torch.zeros(3)})


def test_sync_without_delayed_layers_warns() -> None:
    with pytest.warns(UserWarning, match="no layer uses delayed scaling"):
        sync_float8_amax_and_scale_history(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sync_float8_amax_and_scale_history(Float8Linear(16, 16, config=config()))
