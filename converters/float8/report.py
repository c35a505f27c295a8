"""The start-up report of a conversion: what each group of alike linears is on one device, and what of it.

A group that was kept says why. One that was converted says what a calibration timed, or, where none is given,
whether the cost model (`converters.float8.cost`) expects it to lose.
"""

from __future__ import annotations

import re
from typing import Any

from converters.base import ConversionRow, ConverterContext
from converters.float8 import cost
from converters.float8.calibration import Calibration
from converters.float8.config import Float8LinearConfig, Float8LinearRecipeName
from converters.float8.convert import Decision
from converters.float8.gemm import CPU_HAS_ROW_SCALES


class LinearsOfRun:
    """What a run makes of a linear with that FQN."""

    def __init__(self, context: ConverterContext) -> None:
        self.context = context

    def role(self, fqn: str) -> str | None:
        """Its role in the model's table; None where it has none."""
        return next((role for pattern, role in self.context.roles.items() if _matches(pattern, fqn)), None)

    def local_sizes(self, fqn: str, k: int, n: int) -> tuple[int, int, int]:
        """(M, K, N) of one device's GEMM, of in_features `k` and out_features `n` of all."""
        tp = self.context.tp_degree
        if tp > 1:
            role = self.role(fqn)
            if role in ("columnwise", "output"):
                n //= tp
            elif role == "rowwise":
                k //= tp
        return self.context.tokens_per_microbatch, k, n

    def served_by_a_sibling(self, decisions: list[Decision]) -> set[str]:
        """FQNs of linears whose input a compiled block casts for a wider sibling (wk, wv: wq; w3: w1)."""
        if not self.context.compile_model:
            return set()
        readers: dict[tuple[str, int], list[Decision]] = {}
        for each in decisions:
            if each.reason is None and self.role(each.fqn) == "columnwise":
                readers.setdefault((each.fqn.rpartition(".")[0], each.module.in_features), []).append(each)
        return {
            each.fqn
            for group in readers.values()
            for each in sorted(group, key=lambda one: -one.module.out_features)[1:]
        }


def conversion_rows(
    decisions: list[Decision],
    linears: LinearsOfRun,
    config: Float8LinearConfig,
    recipe: Float8LinearRecipeName,
    calibration: Calibration | None,
) -> list[ConversionRow]:
    """One row for all linears of the same sizes and the same fate, in the order of the model."""
    groups: dict[tuple[Any, ...], dict[str, int]] = {}
    served = linears.served_by_a_sibling(decisions)
    for decision in decisions:
        fqn, k, n = decision.fqn, decision.module.in_features, decision.module.out_features
        local, reason = linears.local_sizes(fqn, k, n), decision.reason
        if reason is None:
            timing = None if calibration is None else calibration.find(local)
            timed = None if timing is None else f"calibration: {timing.speedup:.2f}x of bf16's speed"
            remark = _remark(local, fqn in served, linears.context.device_type, config, recipe)
            reason = timed if timed and not config.emulate else remark
        patterns = groups.setdefault((k, n, local, decision.reason is None, reason), {})
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$|^\d+$", "*", fqn)
        patterns[pattern] = patterns.get(pattern, 0) + 1
    return [
        ConversionRow(_fold(list(patterns)), sum(patterns.values()), k, n, local, converted, reason)
        for (k, n, local, converted, reason), patterns in groups.items()
    ]


def _remark(
    local: tuple[int, int, int],
    shares_input: bool,
    device_type: str,
    config: Float8LinearConfig,
    recipe: Float8LinearRecipeName,
) -> str:
    """What is to be known of a converted linear that nobody has timed; empty where nothing is."""
    if config.emulate:
        return "emulated"
    if device_type == "cpu" and config.axiswise and not CPU_HAS_ROW_SCALES:
        return "emulated: this torch has no row-scaled float8 GEMM on a CPU"
    if device_type != "cuda":
        return f"on {device_type}: for numerics, not for speed"
    casts: cost.Casts = "triton" if config.cast_kernels == "triton" else "compiled"
    speedup = cost.linear_cost(recipe, *local, casts=casts, shares_input=shares_input).speedup
    return f"expected to lose: about {speedup:.2f}x of bf16's speed" if speedup < 1 else ""


def _matches(pattern: str, fqn: str) -> bool:
    parts, wanted = fqn.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


def _fold(patterns: list[str]) -> str:
    """``a.b.wk, a.b.wv`` -> ``a.b.{wk,wv}``."""
    heads: dict[str, list[str]] = {}
    for pattern in patterns:
        head, dot, tail = pattern.rpartition(".")
        heads.setdefault(head + dot, []).append(tail)
    return ", ".join(
        head + (tails[0] if len(tails) == 1 else "{" + ",".join(tails) + "}") for head, tails in heads.items()
    )
