"""Which linears become float8, and why the others do not.

A linear is kept in high precision when, in this order:

1. its class is not exactly `nn.Linear` (a subclass has its own forward);
2. an entry of `filter_fqns` is a substring of its FQN (an entry that matches no linear is an error);
3. K or N is not divisible by 16, unless `pad_inner_dim`;
4. `auto_filter_small_kn` is an entry and (N, K) is under the recipe's threshold: the casts would
   cost more than the GEMMs gain. Thresholds are inclusive, on global sizes, and were read off H100
   tables; they know neither M nor tensor parallelism. ROWWISE_WITH_GW_HP has no rule of its own in
   the tables and uses the rowwise one;
5. a calibration was given and its local (M, K, N) was measured to be no faster in float8. Such a
   measurement knows what the rule above does not, so a run has one of the two.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from converters.float8.calibration import Calibration, ShapeTiming, Sizes
from converters.float8.config import Float8LinearRecipeName
from converters.float8.gemm import ALIGNMENT

AUTO_FILTER = "auto_filter_small_kn"

LocalSizes = Callable[[str, int, int], Sizes]
"""(FQN, global K, global N) -> (M, K, N) of one device's GEMM."""


def _small_tensorwise(k: int, n: int) -> bool:
    return k <= 4096 and n <= 1024


def _small_rowwise(k: int, n: int) -> bool:
    return n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048)


_Rule = tuple[Callable[[int, int], bool], str]
_ROWWISE_RULE: _Rule = (_small_rowwise, "N <= 2048, or K <= 1024, or (N <= 4096 and K <= 2048)")
_RULES: dict[Float8LinearRecipeName, _Rule] = {
    Float8LinearRecipeName.TENSORWISE: (_small_tensorwise, "K <= 4096 and N <= 1024"),
    Float8LinearRecipeName.ROWWISE: _ROWWISE_RULE,
    Float8LinearRecipeName.ROWWISE_WITH_GW_HP: _ROWWISE_RULE,
}


def misaligned_reason(k: int, n: int) -> str | None:
    """Why a linear of these sizes needs `pad_inner_dim`, or None."""
    bad = [f"{name} = {size}" for name, size in (("K", k), ("N", n)) if size % ALIGNMENT]
    return f"{' and '.join(bad)} not divisible by {ALIGNMENT}; pad_inner_dim pads" if bad else None


class LinearFilter:
    """A `module_filter_fn` that can also say why, and whether its entries match anything."""

    def __init__(
        self,
        recipe: Float8LinearRecipeName,
        filter_fqns: Sequence[str],
        *,
        pad_inner_dim: bool = False,
        calibration: Calibration | None = None,
        local_sizes: LocalSizes | None = None,
    ) -> None:
        if calibration is not None and local_sizes is None:
            raise ValueError("a calibration needs local_sizes: (FQN, K, N) -> (M, K, N) of a device's GEMM")
        self.recipe = recipe
        self.substrings = [entry for entry in filter_fqns if entry != AUTO_FILTER]
        self.auto = AUTO_FILTER in filter_fqns
        self.pad_inner_dim = pad_inner_dim
        self.calibration = calibration
        self.local_sizes = local_sizes

    def __call__(self, module: nn.Module, fqn: str) -> bool:
        """True where the linear is to be converted."""
        return isinstance(module, nn.Linear) and self.reason(module, fqn) is None

    def reason(self, module: nn.Linear, fqn: str) -> str | None:
        """Why this linear stays in high precision; None where it does not."""
        for entry in self.substrings:
            if entry in fqn:
                return f"filter_fqns has {entry!r}"
        k, n = module.in_features, module.out_features
        misaligned = None if self.pad_inner_dim else misaligned_reason(k, n)
        if misaligned is not None:
            return misaligned
        small, rule = _RULES[self.recipe]
        if self.auto and small(k, n):
            return f"{AUTO_FILTER}: {rule}"
        timing = self.timing(fqn, k, n)
        if timing is not None and not timing.convert:
            return f"calibration: {timing.speedup:.2f}x of bf16's speed"
        return None

    def timing(self, fqn: str, k: int, n: int) -> ShapeTiming | None:
        """What was measured of a linear; None without a calibration, or where it lacks the shape."""
        if self.calibration is None or self.local_sizes is None:
            return None
        return self.calibration.find(self.local_sizes(fqn, k, n))

    def check_timed(self, linears: Iterable[tuple[str, nn.Linear]]) -> None:
        """Raise where the calibration is asked for a shape that it lacks.

        Raises:
            ValueError: naming the shapes.
        """
        if self.calibration is None or self.local_sizes is None:
            return
        lacking: dict[Sizes, str] = {}
        for fqn, linear in linears:
            k, n = linear.in_features, linear.out_features
            wanted = type(linear) is nn.Linear and self.reason(linear, fqn) is None
            if wanted and self.timing(fqn, k, n) is None:
                lacking.setdefault(self.local_sizes(fqn, k, n), fqn)
        if lacking:
            shown = ", ".join(f"{sizes} of {fqn}" for sizes, fqn in list(lacking.items())[:4])
            more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
            raise ValueError(
                f"calibration: lacks (M, K, N) = {shown}{more};\n"
                "run octavo calibrate with this run's settings, or keep these linears by filter_fqns"
            )

    def check(self, linear_fqns: Iterable[str]) -> None:
        """Raise where an entry matches none of the model's linears.

        Raises:
            ValueError: with the nearest name for each such entry.
        """
        fqns = list(linear_fqns)
        unmatched = [entry for entry in self.substrings if not any(entry in fqn for fqn in fqns)]
        if not unmatched:
            return
        names = _name_pieces(fqns)
        hints = []
        for entry in unmatched:
            near = difflib.get_close_matches(entry, [*names, AUTO_FILTER], n=1, cutoff=0.5)
            hints.append(f"{entry!r}" + (f" (nearest: {near[0]!r})" if near else ""))
        last_parts = sorted({fqn.rpartition(".")[2] for fqn in fqns})
        shown = ", ".join(last_parts[:12]) + (", ..." if len(last_parts) > 12 else "")
        raise ValueError(
            f"float8 filter_fqns: no linear's FQN contains {', '.join(hints)}\n"
            f"linears of this model are named: {shown}"
        )


def _name_pieces(fqns: Iterable[str]) -> list[str]:
    """All dotted tails of the FQNs: what a user would write to mean some of them."""
    pieces: dict[str, None] = {}
    for fqn in fqns:
        parts = fqn.split(".")
        for start in range(len(parts)):
            pieces[".".join(parts[start:])] = None
    return list(pieces)


def auto_filter_for_recipe(
    recipe: Float8LinearRecipeName | str,
    filter_fqns: Sequence[str],
    *,
    pad_inner_dim: bool = False,
    calibration: Calibration | None = None,
    local_sizes: LocalSizes | None = None,
) -> LinearFilter:
    """A `module_filter_fn` for `convert_to_float8_training`.

    Args:
        recipe: whose thresholds `auto_filter_small_kn` uses.
        filter_fqns: substrings of FQNs to keep in high precision; `auto_filter_small_kn` among them
            also keeps the linears that are too small to gain.
        pad_inner_dim: as in the `Float8LinearConfig`: take sizes not divisible by 16 too.
        calibration: measured times; keeps the linears that they show to lose.
        local_sizes: with a calibration: (FQN, K, N) of a linear -> (M, K, N) as a device computes it.
    """
    return LinearFilter(
        Float8LinearRecipeName(recipe),
        filter_fqns,
        pad_inner_dim=pad_inner_dim,
        calibration=calibration,
        local_sizes=local_sizes,
    )
