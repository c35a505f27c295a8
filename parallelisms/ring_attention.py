"""Causal attention over a sequence that is spread over ranks, as one op with its backward.

Each rank holds some rows of q, k, v of every sequence. Queries stay; keys and values visit every rank, and
what a rank's queries give on each visit is merged by its log-sum-exp (`parallelisms.partial_attention`).
(Ring Attention: Liu et al. 2023, arXiv 2310.01889.) Two ways to visit (`rotate`):

    alltoall    one ring step at a time: while the keys of rank s are used, those of the next rank arrive.
                Memory: two parts of k, v. In backward dk, dv of a part travel with it and gather shares.
    allgather   all parts at once, the own part is used while they arrive. Memory: k, v of all ranks.
                Backward gathers again and reduce-scatters dk, dv.

Only the H_kv key heads travel; dk and dv travel in fp32. Backward visits again: nothing of other ranks is
kept. Elements sent per rank and block of the model, with P ranks and n = 2 B (S/P) H_kv Dh (k and v):
forward (P - 1) n, backward (P - 1) n and (P - 1) n in fp32 (alltoall: P n).

Causal work. Rank r of P holds, in order of position,

    one chunk   [r]                  of P chunks: later ranks work more, the last one always
    balanced    [r, 2P-1-r]          of 2P chunks, a head and a tail: all ranks work alike

and by the rank s that the visiting keys come from:

              one chunk       balanced
    s = r     causal          causal (rows are in order of position, so the plain causal mask is right)
    s < r     all x all       all queries x head keys    (s < r, but 2P-1-s is behind both own chunks)
    s > r     nothing         tail queries x all keys    (s and 2P-1-s are both before 2P-1-r only)

A custom op, so that the compiler keeps it whole and selective checkpointing can save its result.

Legend: B sequences, S positions, T = S/P own positions, H query heads, H_kv key heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.operators import operator
from parallelisms.partial_attention import attend, attend_backward, merge

_c10d = torch.ops._c10d_functional


@operator("ring_attention")
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: str, rotate: str, balanced: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Causal attention of this rank's queries to the keys of all ranks of `group`.

    Args:
        q: (B, H, T, Dh), this rank's rows.
        k: (B, H_kv, T, Dh), the same rows.
        v: (B, H_kv, T, Dh).
        group: Name of the process group.
        rotate: ``alltoall`` or ``allgather``.
        balanced: Rows are chunks r and 2P-1-r rather than one chunk.
        backend: Kernel, as for `partial_attention.attend`.

    Returns:
        Output (B, H, T, Dh) in q's dtype, log-sum-exp (B, H, T).
    """
    ring = _Ring.of(group, balanced)
    B, H, T, Dh = q.shape
    out = lse = q.new_empty(0)
    for source, visiting in ring.visits(_stack(k, v), rotate):
        part = ring.part(source, T)
        if part is None:
            continue
        rows, keys, causal = part
        their_k, their_v = visiting[:, :, :, keys].unbind()
        one_out, one_lse = attend(q[:, :, rows], their_k, their_v, causal, backend)
        if source == ring.rank:
            # Stored as (B, T, H, Dh): the model puts the heads of a position side by side next.
            out = q.new_empty(B, T, H, Dh, dtype=one_lse.dtype).transpose(1, 2).copy_(one_out)
            lse = one_lse.clone(memory_format=torch.contiguous_format)
        else:
            merge(out[:, :, rows], lse[:, :, rows], one_out, one_lse)
    return out.to(q.dtype), lse


@operator("ring_attention_backward")
def ring_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    group: str,
    rotate: str,
    balanced: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dq, dk and dv stacked) of `ring_attention`, from its results and the gradient of its output."""
    ring = _Ring.of(group, balanced)
    dq = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
    kv = _stack(k, v)
    zeros = torch.zeros_like(kv, dtype=lse.dtype)
    shares = _GatheredShares(ring, zeros) if rotate == "allgather" else _TravellingShares(ring, zeros)
    for source, visiting in ring.visits(kv, rotate):
        share = shares.blank(source)
        if part := ring.part(source, q.shape[2]):
            rows, keys, causal = part
            my_grad, my_q, my_out = (t[:, :, rows] for t in (grad, q, out))
            my_lse = lse[:, :, rows].contiguous()
            their_k, their_v = visiting[:, :, :, keys].unbind()
            one_dq, *one_dkv = attend_backward(
                my_grad, my_q, their_k, their_v, my_out, my_lse, causal, backend
            )
            dq[:, :, rows] += one_dq
            for blank, one in zip(share[:, :, :, keys], one_dkv, strict=True):
                blank.copy_(one)
        shares.add(share)
    return dq.to(q.dtype), shares.own().to(k.dtype)


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, H, T, Dh = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B, T, H, Dh).transpose(1, 2), q.new_empty(B, H, T, dtype=precise)


@ring_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(2, *k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    # Nothing is computed from the log-sum-exp, so its gradient is zero.
    dq, dkv = ring_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dq, *dkv.unbind(), None, None, None, None


ring_attention.register_autograd(_differentiate, setup_context=_save)

RING_ATTENTION = torch.ops.octavo.ring_attention.default
"""The op as compilers and checkpointing policies see it."""


def _stack(k: Tensor, v: Tensor) -> Tensor:
    """(2, B, H_kv, T, Dh), contiguous: what travels."""
    return torch.stack((k, v)).contiguous()


@dataclass(frozen=True)
class _Ring:
    """A process group seen from one of its ranks."""

    group: str
    rank: int
    size: int
    balanced: bool

    @classmethod
    def of(cls, group: str, balanced: bool) -> _Ring:
        process_group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        return cls(group, process_group.rank(), process_group.size(), balanced)

    def part(self, source: int, T: int) -> tuple[slice, slice, bool] | None:
        """(own rows, keys of rank `source`, whether masked) that meet; None where nothing does."""
        every = slice(None)
        if source == self.rank:
            return every, every, True
        if not self.balanced:
            return (every, every, False) if source < self.rank else None
        half = T // 2
        return (every, slice(half), False) if source < self.rank else (slice(half, None), every, False)

    def visits(self, kv: Tensor, rotate: str) -> Iterator[tuple[int, Tensor]]:
        """(rank, its k and v), the own first; the next arrive while the caller computes."""
        if rotate == "allgather":
            gathered = _c10d.all_gather_into_tensor(kv, self.size, self.group)
            yield self.rank, kv
            parts = _c10d.wait_tensor(gathered).view(self.size, *kv.shape)
            for step in range(1, self.size):
                source = (self.rank - step) % self.size
                yield source, parts[source]
            return
        for step in range(self.size):
            coming = self.pass_on(kv) if step < self.size - 1 else kv
            yield (self.rank - step) % self.size, kv
            if coming is not kv:
                kv = self.arrived(coming, kv.shape)

    def pass_on(self, t: Tensor) -> Tensor:
        """Send `t` to the next rank; returns what will come from the one before, for `arrived`."""
        out, into = [0] * self.size, [0] * self.size
        out[(self.rank + 1) % self.size] = into[(self.rank - 1) % self.size] = t.numel()
        return _c10d.all_to_all_single(t.view(-1), into, out, self.group)

    def arrived(self, coming: Tensor, shape: torch.Size) -> Tensor:
        """Wait for what `pass_on` announced."""
        return _c10d.wait_tensor(coming).view(shape)


class _GatheredShares:
    """Shares of dk, dv of all ranks, summed and dealt out at the end."""

    def __init__(self, ring: _Ring, zeros: Tensor) -> None:
        self.ring = ring
        self.together = zeros.repeat(ring.size, *(1 for _ in zeros.shape[1:]))  # (2 P, B, H_kv, T, Dh)

    def blank(self, source: int) -> Tensor:
        return self.together[2 * source : 2 * source + 2]

    def add(self, share: Tensor) -> None:
        """Nothing to do: what `blank` gave is part of the whole."""

    def own(self) -> Tensor:
        summed = _c10d.reduce_scatter_tensor(self.together, "sum", self.ring.size, self.ring.group)
        return _c10d.wait_tensor(summed)


class _TravellingShares:
    """Sums that go round one step behind the keys they belong to, and home at the end."""

    def __init__(self, ring: _Ring, zeros: Tensor) -> None:
        self.ring, self.zeros = ring, zeros
        self.coming: Tensor | None = None

    def blank(self, source: int) -> Tensor:
        return torch.zeros_like(self.zeros)

    def add(self, share: Tensor) -> None:
        if self.coming is not None:
            share += self.ring.arrived(self.coming, share.shape)
        self.coming = self.ring.pass_on(share)

    def own(self) -> Tensor:
        assert self.coming is not None
        return self.ring.arrived(self.coming, self.zeros.shape)
