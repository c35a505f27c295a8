"""The converter contract: an object that changes a model and says what it did.

A converter rewrites modules of a freshly built model (on ``meta``), before parallelism, compile and
FSDP see it. The rest of the program never asks *which* converter is active; it asks the object for
a capability (a parallel style, a hook), so renaming a converter can switch nothing off.

Order of calls in a run::

    converter = entry.build(section, context)      # may raise ValueError: setting cannot work here
    report    = converter.convert(model)           # in place; the report is logged and kept
    style     = converter.parallel_style(fqn, module, role)   # per module, when TP is on
    converter.before_step(model, step) # once a step, before its first forward
    ... forward, backward ...
    converter.after_backward(model)                # once a step, before clipping and the optimizer
    optimizer.step()
    converter.after_optimizer_step(model)          # once a step
    converter.metrics(model)                       # once a step, when it is logged

A converter's own state (what is not a parameter of the unconverted model) is saved beside the
model's under `state_dict`, so that the model's checkpoint keys never depend on a converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True)
class ConverterContext:
    """What a converter may know of the run it converts for."""

    device_type: str
    """``cuda`` or ``cpu``."""
    tokens_per_microbatch: int
    """Rows M that one linear sees at once on one device: sequences of a micro-batch times their length."""
    tp_degree: int = 1
    dp_shard_degree: int = 1
    compile_model: bool = False
    dry_run: bool = False
    """Shapes without values on a CPU, in place of the run's device."""
    layer_group: Any = None
    """Process group of the ranks that hold the same layers; all ranks when unset (no pipeline)."""
    stage_group: Any = None
    """Process group of the ranks that hold the other pipeline stages; unset without a pipeline."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The model's FQN pattern -> role table: ``columnwise`` linears split N under TP, ``rowwise`` ones K."""


@dataclass(frozen=True)
class ConverterEntry:
    """One row of the CONVERTERS table: plain data, and one function that imports the code."""

    name: str
    """Canonical name, as in ``model.converters``."""
    section: str
    """Path of its config section in the job config."""
    description: str
    build: Callable[[Any, ConverterContext], Converter]
    """(section, context) -> converter; raises ValueError where a setting cannot work here."""


@dataclass(frozen=True)
class ConversionRow:
    """All linears of one shape and one decision."""

    fqn: str
    """FQN pattern: layer indices folded to ``*``."""
    count: int
    k: int
    """in_features (global)."""
    n: int
    """out_features (global)."""
    local_mkn: tuple[int, int, int]
    """(M, K, N) of one device's GEMM."""
    converted: bool
    reason: str
    """Why it was left alone, or a remark on a converted one; empty when there is nothing to say."""


@dataclass(frozen=True)
class ConversionReport:
    """What a converter did, with counts; shown at start and kept in the run folder."""

    name: str
    rows: Sequence[ConversionRow]

    @property
    def total(self) -> int:
        """Linears seen."""
        return sum(row.count for row in self.rows)

    @property
    def converted(self) -> int:
        """Linears converted."""
        return sum(row.count for row in self.rows if row.converted)

    @property
    def flops_share(self) -> float:
        """Share of the linears' FLOPs (proportional to K x N) that was converted, in 0..1."""
        total = sum(row.count * row.k * row.n for row in self.rows)
        done = sum(row.count * row.k * row.n for row in self.rows if row.converted)
        return done / total if total else 0.0

    def summary(self) -> str:
        """One line: ``float8: converted 160 of 225 linears (96 % of linear FLOPs)``."""
        share = f"{100 * self.flops_share:.0f} % of linear FLOPs"
        return f"{self.name}: converted {self.converted} of {self.total} linears ({share})"

    def lines(self) -> list[str]:
        """The summary and one line per row, for the log."""
        rows = []
        for row in self.rows:
            m, k, n = row.local_mkn
            verdict = self.name if row.converted else "kept"
            reason = f"  ({row.reason})" if row.reason else ""
            rows.append(
                f"  {row.count:>4} x {row.fqn:<32} K={row.k:<6} N={row.n:<6} "
                f"local (M, K, N)=({m}, {k}, {n})  {verdict}{reason}"
            )
        return [self.summary(), *rows]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for the run folder."""
        return {
            "name": self.name,
            "converted": self.converted,
            "total": self.total,
            "flops_share": self.flops_share,
            "rows": [asdict(row) for row in self.rows],
        }


class Converter:
    """Base of all converters: every capability has a default that does nothing."""

    name: str = ""

    def convert(self, model: nn.Module) -> ConversionReport:
        """Rewrite `model` in place and report it."""
        raise TypeError(f"{type(self).__name__} does not define convert()")

    def parallel_style(self, fqn: str, module: nn.Module, role: str) -> Any | None:
        """The tensor-parallel style for a module this converter made, or None for the plain one."""
        return None

    def ops_to_save(self) -> tuple[Any, ...]:
        """Ops (`torch.ops.aten...default`) whose outputs per-op selective checkpointing should save.

        Of matmuls it saves every second one, whether they are among these or not.
        """
        return ()

    def optimizer_built(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called once, when the parameters have memory and before a checkpoint is loaded."""

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called once a step (counted from 1), before its first forward."""

    def after_backward(self, model: nn.Module) -> None:
        """Called once a step when all micro-batches' gradients are there."""

    def after_optimizer_step(self, model: nn.Module) -> None:
        """Called once a step when the parameters have their new values."""

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Scalars to log with this step (tag -> value); empty when there is nothing."""
        return {}

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The converter's own state as plain tensors, saved beside the model's; empty when there is none."""
        return {}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; raises ValueError where it does not fit `model`."""
        if state:
            raise ValueError(
                f"{self.name}: has no state of its own, but a checkpoint brings {sorted(state)[:3]}"
            )
