"""Delayed scaling: cast with a scale made of past steps' amaxes (Micikevicius et al. 2022, 4.3).

Each Float8Linear keeps for input, weight and grad_output, in fp32, outside its state_dict:

    float8_amax_<tensor>     ()       largest amax since the last sync (of all micro-batches)
    float8_scale_<tensor>    ()       the stored scale; 0 until there is one
    float8_amax_history      (3, H)   one row a tensor, newest first: a true rolling window

    forward, backward:  amax_slot = max(amax_slot, amax(t));  cast t with the stored scale, saturating
    sync, once a step:  MAX all-reduce of all amax slots; shift into the history; slots = 0
                        scale = fmax / max(history), as `scaling.scale_from_amax`

Until a tensor has a stored scale it is scaled dynamically (the first step, all its micro-batches). A
tensor whose whole window is zero has none either: fmax / 1e-12 would clip the first value that comes. An
amax that is inf or NaN enters the window as 0, so that one bad step, which a run may skip, does not spoil
the scale for `history_len` steps. In eval mode nothing is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from converters.float8.scaling import scale_from_amax

if TYPE_CHECKING:
    from converters.float8.linear import Float8Linear

TENSORS = ("input", "weight", "grad_output")
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def register_delayed_state(module: nn.Module, history_len: int, device: torch.device) -> None:
    """Give `module` its buffers, none of them part of its state_dict."""
    for tensor in TENSORS:
        module.register_buffer(f"float8_amax_{tensor}", torch.zeros((), device=device), persistent=False)
        module.register_buffer(f"float8_scale_{tensor}", torch.zeros((), device=device), persistent=False)
    history = torch.zeros(len(TENSORS), history_len, device=device)
    module.register_buffer("float8_amax_history", history, persistent=False)


def record_amax(slot: Tensor, amax: Tensor) -> None:
    """Keep the largest amax since the last sync. Recording one twice (recomputation) changes nothing."""
    slot.copy_(torch.maximum(slot, amax.to(torch.float32)))


def stored_or_dynamic_scale(stored: Tensor, dynamic: Tensor) -> Tensor:
    """The stored scale where there is one; no branch, so that it compiles."""
    return torch.where(stored > 0, stored, dynamic)


def delayed_layers(model: nn.Module) -> dict[str, Float8Linear]:
    """FQN (without wrapper prefixes) -> layer, for all that keep delayed state."""
    found = {}
    for name, module in model.named_modules():
        if "float8_amax_history" in module._buffers:
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found[name] = cast("Float8Linear", module)
    return found


@torch.no_grad()
def sync_float8_amax_and_scale_history(
    model: nn.Module,
    fp8_layers: Iterable[nn.Module] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """After backward, once a step: push this step's amaxes into the histories and renew the scales.

    Args:
        model: the converted model.
        fp8_layers: its delayed layers, to save looking for them at each call.
        group: ranks that hold the same layers; all of them when unset.
    """
    given = list(delayed_layers(model).values()) if fp8_layers is None else list(fp8_layers)
    layers = cast("list[Float8Linear]", [layer for layer in given if "float8_amax_history" in layer._buffers])
    if not layers:
        warnings.warn(
            "sync_float8_amax_and_scale_history has no effect: no layer uses delayed scaling", stacklevel=3
        )
        return
    slots = [_buffer(layer, f"float8_amax_{tensor}") for layer in layers for tensor in TENSORS]
    amaxes = torch.stack(slots)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=group)
    amaxes = torch.where(torch.isfinite(amaxes), amaxes, 0.0).reshape(len(layers), len(TENSORS))
    torch._foreach_zero_(slots)
    by_kind: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        by_kind.setdefault(_kind(layer), []).append(index)
    for (_, dtypes, power_of_2), indices in by_kind.items():
        _push([layers[i] for i in indices], amaxes[indices], dtypes, power_of_2)


def _kind(layer: Float8Linear) -> tuple[int, tuple[torch.dtype, ...], bool]:
    config = layer.config
    dtypes = tuple(config.cast(f"cast_config_{tensor}").dtype for tensor in TENSORS)
    return config.delayed_scaling_config.history_len, dtypes, config.round_scales_to_power_of_2


def _push(layers: list[Float8Linear], amaxes: Tensor, dtypes: Any, power_of_2: bool) -> None:
    histories = [_buffer(layer, "float8_amax_history") for layer in layers]
    window = torch.stack(histories)  # (L, 3, H)
    window = torch.cat([amaxes.unsqueeze(-1), window[..., :-1]], dim=-1)
    torch._foreach_copy_(histories, list(window.unbind()))
    largest = window.amax(dim=-1)  # (L, 3)
    scales = torch.stack(
        [scale_from_amax(largest[:, i], dtype, power_of_2) for i, dtype in enumerate(dtypes)], dim=1
    )
    scales = torch.where(largest > 0, scales, 0.0)
    targets = [_buffer(layer, f"float8_scale_{tensor}") for layer in layers for tensor in TENSORS]
    torch._foreach_copy_(targets, list(scales.flatten().unbind()))


def _buffer(layer: nn.Module, name: str) -> Tensor:
    buffer = layer._buffers[name]
    assert buffer is not None
    return buffer


def delayed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All delayed state as plain tensors: ``<fqn>.amax``, ``.scale`` and ``.amax_history`` of each layer."""
    state = {}
    for fqn, layer in delayed_layers(model).items():
        for kind in ("amax", "scale"):
            state[f"{fqn}.{kind}"] = torch.stack(
                [_buffer(layer, f"float8_{kind}_{tensor}") for tensor in TENSORS]
            )
        state[f"{fqn}.amax_history"] = _buffer(layer, "float8_amax_history").clone()
    return state


@torch.no_grad()
def load_delayed_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `delayed_state_dict` gave, exactly.

    Raises:
        ValueError: a layer is missing on either side, or a history has another length.
    """
    layers = delayed_layers(model)
    wanted = {f"{fqn}.{kind}" for fqn in layers for kind in ("amax", "scale", "amax_history")}
    if wanted != set(state):
        missing, extra = sorted(wanted - set(state))[:2], sorted(set(state) - wanted)[:2]
        raise ValueError(
            f"float8 delayed state does not fit the model: missing {missing}, not expected {extra}"
        )
    for fqn, layer in layers.items():
        history = _buffer(layer, "float8_amax_history")
        saved = state[f"{fqn}.amax_history"]
        if saved.shape != history.shape:
            raise ValueError(
                f"float8 delayed state of {fqn}: history has shape {tuple(saved.shape)}, "
                f"the model's delayed_scaling_config asks for {tuple(history.shape)}"
            )
        history.copy_(saved)
        for kind in ("amax", "scale"):
            for tensor, value in zip(TENSORS, state[f"{fqn}.{kind}"], strict=True):
                _buffer(layer, f"float8_{kind}_{tensor}").copy_(value)
