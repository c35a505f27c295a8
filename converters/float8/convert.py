"""The swap: `nn.Linear` -> `Float8Linear`, in place, children before parents.

Parameters stay the same objects (an optimizer made before keeps working), the state dict keeps its
keys, hooks and mode carry over, and a linear used in two places is one float8 linear in both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from converters.float8.config import Float8LinearConfig
from converters.float8.filters import LinearFilter, misaligned_reason
from converters.float8.gemm import check_device
from converters.float8.linear import Float8Linear

ModuleFilter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Decision:
    """What happens to one linear."""

    fqn: str
    module: nn.Linear
    reason: str | None
    """Why it stays in high precision; None where it is converted."""


def decide(
    module: nn.Module, module_filter_fn: ModuleFilter | None, config: Float8LinearConfig
) -> list[Decision]:
    """One decision for each linear of `module`, in the order of `named_modules`; changes nothing.

    Raises:
        ValueError: the filter has an entry that matches no linear, or a calibration that lacks a shape.
    """
    linears = [(fqn, child) for fqn, child in module.named_modules() if isinstance(child, nn.Linear)]
    if isinstance(module_filter_fn, LinearFilter):
        module_filter_fn.check(fqn for fqn, _ in linears)
        module_filter_fn.check_timed(linears)
    return [Decision(fqn, child, _reason(child, fqn, module_filter_fn, config)) for fqn, child in linears]


def _reason(
    linear: nn.Linear, fqn: str, module_filter_fn: ModuleFilter | None, config: Float8LinearConfig
) -> str | None:
    if isinstance(linear, Float8Linear):
        return "is a Float8Linear already"
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of nn.Linear with its own forward"
    if isinstance(module_filter_fn, LinearFilter):
        reason = module_filter_fn.reason(linear, fqn)
        if reason is not None:
            return reason
    elif module_filter_fn is not None and not module_filter_fn(linear, fqn):
        return "module_filter_fn returned False"
    return None if config.pad_inner_dim else misaligned_reason(linear.in_features, linear.out_features)


def swap(
    module: nn.Module, decisions: list[Decision], config_of: Callable[[str], Float8LinearConfig]
) -> nn.Module:
    """Carry out `decisions`; returns `module`, or its replacement where it is itself a linear.

    `config_of` gives the config of a linear by its FQN.
    """
    chosen = {id(decision.module): decision.fqn for decision in decisions if decision.reason is None}
    made: dict[int, Float8Linear] = {}
    seen: set[int] = set()

    def replacement(child: nn.Module) -> nn.Module:
        if id(child) in made:
            return made[id(child)]
        if id(child) not in seen:
            seen.add(id(child))
            for name, grandchild in child._modules.items():
                if grandchild is not None:
                    child._modules[name] = replacement(grandchild)
        if id(child) not in chosen:
            return child
        assert isinstance(child, nn.Linear)
        made[id(child)] = Float8Linear.from_float(child, config_of(chosen[id(child)]))
        return made[id(child)]

    return replacement(module)


def convert_to_float8_training(
    module: nn.Module,
    *,
    module_filter_fn: ModuleFilter | None = None,
    config: Float8LinearConfig | None = None,
) -> nn.Module:
    """Make the linears of `module` train in float8.

    Args:
        module: changed in place; on any device, ``meta`` included.
        module_filter_fn: (linear, FQN) -> True to convert it; all linears when unset.
            `auto_filter_for_recipe` makes one.
        config: the casts and GEMMs; tensorwise dynamic scaling when unset.

    Returns:
        `module`; or, where `module` is itself an `nn.Linear`, the `Float8Linear` for it.

    Raises:
        ValueError: the module is on a device without float8 GEMMs, or the filter matches nothing.
    """
    config = config or Float8LinearConfig()
    for param in module.parameters():
        device = param.device
        check_device(device.type, device.index, axiswise=config.axiswise, emulate=config.emulate)
        break
    decisions = decide(module, module_filter_fn, config)
    if not any(decision.reason is None for decision in decisions):
        why = "; ".join(sorted({d.reason for d in decisions if d.reason})[:3]) or "it has no nn.Linear"
        warnings.warn(f"convert_to_float8_training converted nothing: {why}", stacklevel=2)
    return swap(module, decisions, lambda fqn: config)
