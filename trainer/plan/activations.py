"""Bytes that a block keeps from forward to backward, by activation checkpointing mode.

Per position and tensor-parallel rank, in elements (D model width; N, K out and in features on this rank; p
the tensor-parallel degree; a part is attention or feed-forward):

    x           D/p        input of the block
    y           D          normed input of a part, gathered where p > 1
    q k v, w1 w3 out       N of each columnwise linear
    o           K          attention's output, with a log-sum-exp per head
    a           K          silu(w1 x) * w3 x, the input of w2
    h           D/p        residual stream between the parts

What of these is kept:

- ``none``, compiled: x, all N, o, h; y and a where they are an operand of a weight's gradient in the compute
  dtype. A float8 linear needs only a cast of its input, which the compiler fuses with what made it, so it
  keeps the source and neither y nor a. (The partitioner does keep the casted o.) Weights that FSDP gathers in
  float8 it keeps too, turned for the gradient: to it a turned copy costs no more than what it is made of. It
  takes most of them; they are counted in full. `force_recompute_fp8_weight_in_bwd` forbids it.
  Triton's casts it does not look into. With ``saved_input = "float8"`` those of y, o and a are kept, one of
  each; with ``least`` those of y; otherwise the compiler casts y and a in forward, and o in backward.
  What a fused kernel makes (`norm_kernel`, `swiglu_kernel`) the compiler does not make again: where a float8
  linear reads it, it keeps the cast of it. The rotary kernel (`rope_kernel`) changes nothing: attention keeps
  q and k turned, however they were, and the kernel only the model's tables.
- ``none``, eager: every tensor that an operation saved: y and a, or where `saved_input` has float8 a cast of
  them for each linear that reads them; and silu's output besides (which the fused kernel does not have).
- ``full``: x.
- ``selective`` with n: every n-th block as ``full``, the others as ``none``.
- ``selective`` with ``op``: x, o, and the results of every second matmul, plain or float8. Where
  `saved_input` has float8 also the casts, and compiled those of weights: turned for backward, and as forward
  reads them too where a matmul that is computed again reads them (in eager mode both always).
  What the last matmul gives enters only a sum, so the compiler drops it where eager mode keeps it.
- ``memory_budget`` b: x + b (none - x).

`tests/trainer/plan/test_activations.py` counts what the real blocks save and finds these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.plan.shapes import BlockShape, LinearShape, Part

_LSE_BYTES = 4
_FLOAT8 = 1


@dataclass(frozen=True)
class Recompute:
    """One resolved activation checkpointing setting."""

    mode: str
    every: int = 1
    """For ``selective`` by layer: every n-th block is recomputed."""
    per_op: bool = False
    budget: float = 1.0

    def describe(self) -> str:
        """As the settings are called: ``selective op``, ``selective 2``, ``full``."""
        if self.mode == "selective":
            return f"selective {'op' if self.per_op else self.every}"
        return f"memory_budget {self.budget:g}" if self.mode == "memory_budget" else self.mode

    def of_layer(self, layer: int) -> str:
        """``none``, ``full``, ``op`` or ``memory_budget`` for the block of that number."""
        if self.mode == "selective":
            if self.per_op:
                return "op"
            return "full" if (layer + 1) % self.every == 0 else "none"
        return self.mode


@dataclass(frozen=True)
class BlockMemory:
    """Sizes of one block's activations on a rank, in bytes of one forward."""

    shape: BlockShape
    tokens: int
    tp: int
    element_bytes: int
    compiled: bool
    float8_weight_bytes: int = 0
    """Of the block's weights that a compiled forward may keep in float8, turned for backward."""
    kept_casts: tuple[str, ...] | None = None
    """Roles of float8 linears that keep the cast of their input; None where the compiler sees into casts."""
    casts_are_results: bool = False
    """They ask for it, rather than a compiler that likes it: per-op recompute keeps casts too."""
    fused_norm: bool = False
    """The norms are kernels that the compiler cannot look into."""
    fused_product: bool = False
    """And so is silu(w1 x) * w3 x."""

    def saved(self, mode: str, budget: float = 1.0) -> int:
        """What stays from forward to backward."""
        if mode == "none":
            return self._everything()
        if mode == "op":
            return self._per_op()
        if mode == "memory_budget":
            return round(self._stream() + budget * (self._everything() - self._stream()))
        return self._stream()

    def working(self, mode: str, budget: float = 1.0) -> int:
        """What the block's own backward needs besides: what is recomputed, and gradients of activations."""
        recomputed = self._everything() - self.saved(mode, budget)
        widest = max(sum(linear.n for linear in part.columnwise) for part in self.shape.parts)
        return recomputed + self._bytes(widest) + 2 * self._stream()

    def _bytes(self, elements_per_token: float) -> int:
        return round(elements_per_token * self.tokens * self.element_bytes)

    def _stream(self) -> int:
        return self._bytes(self.shape.width) // self.tp

    def _log_sum_exp(self) -> int:
        return self.shape.heads * self.tokens * _LSE_BYTES

    def _everything(self) -> int:
        total = 2 * self._stream()  # x and h
        for part in self.shape.parts:
            outputs = sum(linear.n for linear in part.columnwise)
            total += self._input(part) + self._bytes(outputs)
            total += self._attention_output(part) if part.is_attention else self._product(part)
        return total + (self.float8_weight_bytes if self.compiled else 0)

    def _input(self, part: Part) -> int:
        linears = part.columnwise
        if self.tp > 1 and all(linear.float8_gather for linear in linears):
            return self.shape.width * self.tokens * _FLOAT8  # what was gathered
        casts = self._casts(linears)
        if any(linear.high_precision_weight_gradient for linear in linears):
            return self._bytes(self.shape.width) + casts
        if casts:
            return casts
        # A gather is not done twice, so its result is kept whatever the casts are.
        if not self.compiled or self.tp > 1:
            return self._bytes(self.shape.width)
        return self.shape.width * self.tokens * _FLOAT8 if self.fused_norm else 0

    def _attention_output(self, part: Part) -> int:
        width = sum(linear.k for linear in part.rowwise)
        casts = self._casts(part.rowwise) if self.casts_are_results else 0
        if self.kept_casts is None and self.compiled:
            kept = any(linear.high_precision_weight_gradient for linear in part.rowwise)
            casts = 0 if kept else width * self.tokens * _FLOAT8
        return self._bytes(width) + self._log_sum_exp() + casts

    def _product(self, part: Part) -> int:
        width = sum(linear.k for linear in part.rowwise)
        kept = any(linear.high_precision_weight_gradient for linear in part.rowwise)
        casts = self._casts(part.rowwise)
        if not self.compiled:
            product = casts if casts and not kept else self._bytes(width)
            return product + (0 if self.fused_product else self._bytes(width))  # silu's output
        if kept or (self.fused_product and self.kept_casts is not None and not casts):
            return self._bytes(width)
        if casts:
            return casts
        return width * self.tokens * _FLOAT8 if self.fused_product else 0

    def _casts(self, linears: Sequence[LinearShape]) -> int:
        """Of inputs, as forward keeps them: compiled, linears that read one input share its cast."""
        kept = [
            linear.k
            for linear in linears
            if self.kept_casts is not None
            and linear.role in self.kept_casts
            and not linear.high_precision_weight_gradient
        ]
        shared = self.compiled and any(linear.role == "columnwise" for linear in linears)
        return sum(kept[:1] if shared else kept) * self.tokens * _FLOAT8

    def _per_op(self) -> int:
        total = self._stream() + self._log_sum_exp()
        for part in self.shape.parts:
            if part.is_attention:
                total += self._bytes(sum(linear.k for linear in part.rowwise))
        again, linears = self.shape.recomputed_per_op(), self.shape.linears
        for linear in linears[:-1] if self.compiled else linears:
            total += self._result(linear, linear.name not in again)
        return total + self._casts_as_results(again)

    def _casts_as_results(self, again: frozenset[str]) -> int:
        """Kept casts; `again` names the linears whose product backward computes again."""
        if not self.casts_are_results:
            return 0
        total = 0
        for part in self.shape.parts:
            came_in_float8 = self.tp > 1 and all(linear.float8_gather for linear in part.columnwise)
            groups = [[linear] for linear in part.rowwise]
            groups += [] if came_in_float8 else [list(part.columnwise)]
            for linears in groups:
                read_again = any(linear.float8 and linear.name in again for linear in linears)
                total += self._casts(linears) * (2 if read_again or not self.compiled else 1)
        if self.compiled and self.float8_weight_bytes:
            total += self.float8_weight_bytes + sum(
                linear.k * linear.n for linear in self.shape.linears if linear.float8 and linear.name in again
            )
        return total

    def _result(self, linear: LinearShape, kept: bool) -> int:
        size = self._bytes(linear.n) if kept else 0
        if self.tp > 1 and linear.role == "rowwise":
            size += self._stream()  # what the reduce-scatter gives
        return size
