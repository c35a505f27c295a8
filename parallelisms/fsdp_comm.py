"""Where FSDP2's reduced gradients lie, and in which dtype they travel.

FSDP2 reduces a unit's gradients in three steps (torch.distributed.fsdp, 2.11 to 2.13): copy them into one
buffer, the input, on the compute stream; reduce-scatter it into the output on a stream of its own; make the
output's slices the sharded gradients, or add them to those that are there. It asks a `ReduceScatter` object
for both buffers and for the collective. The one here saves memory and bytes:

**Pool.** The CUDA allocator keeps what a stream freed for that stream. Torch's object takes the output on the
reduce stream, so that a rank's sharded gradients (4 bytes a parameter, over the shards) never share memory
with what the compute stream frees as they grow: activations, gathered weights. Here an output that *becomes*
the gradient comes out of the compute stream's pool. No `record_stream`, which would hold freed blocks back
until the GPU has caught up with the host; the order of events is enough:

- nothing of a block's former life is pending: whoever freed it had its last kernel on the compute stream
  before this allocation, and the reduce stream waits for the compute stream between this allocation and
  its first write;
- it is not reused too early: it lives until `zero_grad`, and at the end of every backward the compute stream
  waits for the last event of every unit's reduction, those after an all-reduce over replicas included.

That argument fails for outputs that die *during* backward: those added to a gradient that is there already
(gradient accumulation), cast to the parameters' dtype, copied to the host, or kept as a replica's part
until the last micro-batch. They stay in the reduce stream's pool, where freeing is in order by itself; they
are a unit's shard each.

**One shard.** There is nothing to scatter: FSDP2 copies the input to the output. Here they are the same
tensor wherever it becomes the gradient, and that copy of a tensor onto itself returns at once. 8 bytes a
parameter less to move, and no second buffer.

**Wire.** Backward computes gradients in bf16; torch's way widens them to fp32, sends those and adds. The same
sums come out if bf16 travels and fp32 is added::

    input (N, n) bf16  --all-to-all-->  received (N, n) bf16  --sum over N in fp32-->  output (n,) fp32

(N - 1)/N * 2 bytes a parameter on the wire rather than 4; the copy into the buffer moves 4 rather than 6;
reading what was received and writing the sum moves 2 + 4/N. `kernels.sum_chunks` takes the sum in one pass,
beside the next unit's GEMMs, on a quarter of the GPU: for two ranks of an H200 and 109 M elements each,
torch's reduction took 0.54 ms on all of it, this one takes 0.50 to 0.64, the bytes need 0.20. It is taken in
the order of ranks, so it is deterministic; over two ranks it equals torch's bit for bit. (On a CPU torch
takes it, from some tens of ranks on in another fixed order.) What is received lives as long as the input
(FSDP2 frees that once the compute stream has waited for the collective and the sum): both together are as
large as an fp32 input. It needs each backward's gradients to be reduced at once: a pipeline would add them up
unreduced, in bf16. By copies between GPUs (`parallelisms.fsdp_copies`) there is no input, and what is
received lies in memory that all units share.

On a CPU there are no streams; the same objects do the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# `FSDPModule.set_custom_reduce_scatter` is public, what it takes has no public home yet (torch 2.13).
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from kernels.sum_chunks import SPAN, sum_chunks
from parallelisms.fsdp_copies import PeerExchange, UncopiedGradients
from parallelisms.gradient_squares import remember
from parallelisms.peer_memory import PeerMemory


class _Input(NamedTuple):
    """The buffer that was handed out last, before its output is asked for."""

    numel: int
    tensor: Tensor | None
    """Kept where the output may be the same tensor."""
    stream: torch.cuda.Stream | None
    """On which it was allocated; None on a CPU."""


class GradientReduceScatter(DefaultReduceScatter):
    """Reduces the gradients of one FSDP unit; see the module.

    Args:
        unit: The unit's modules, after `fully_shard`.
        shards: Ranks that a parameter is sharded over, N.
        temporary: Outputs never become gradients: they are copied to the host, or kept for replicas.
        wire_dtype: Gradients travel in this dtype and are added in fp32; None: as FSDP2 asks for, by a
            reduce-scatter.
        peers: They travel by copies into this memory, and without an input; None: by an all-to-all.
        squares: With `wire_dtype`: add up the squares of sums that become gradients as they are, for
            `parallelisms.gradient_squares`.
        last: The unit is the last in backward: nothing is left to be done beside its sums.
    """

    def __init__(
        self,
        unit: Sequence[nn.Module],
        *,
        shards: int,
        temporary: bool,
        wire_dtype: torch.dtype | None = None,
        peers: PeerMemory | None = None,
        squares: bool = False,
        last: bool = False,
    ) -> None:
        self._unit, self._shards = tuple(unit), shards
        self._temporary, self._wire_dtype = temporary, wire_dtype
        self._exchange = None if peers is None else PeerExchange(peers)
        self._adds_squares, self._is_last = squares, last
        self._squares: Tensor | None = None
        self._input: _Input | None = None
        self._compute_stream: torch.cuda.Stream | None = None

    def install(self) -> None:
        """Have FSDP2 use this object for its unit (one that holds no parameters has no use for it)."""
        first = self._unit[0]
        assert isinstance(first, FSDPModule)
        first.set_custom_reduce_scatter(self)

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A buffer: called for the input, then on the reduce stream for the output, an N-th of it."""
        numel = math.prod(int(length) for length in size)
        former, self._input = self._input, None
        if former is not None and former.numel == numel * self._shards:
            return self._output(former, numel, dtype, device)
        if self._wire_dtype not in (None, dtype):
            raise RuntimeError(f"gradients of {dtype} are to be reduced, {self._wire_dtype} was to travel")
        if self._exchange is None:
            buffer = torch.empty(numel, dtype=dtype, device=device)
        else:
            buffer = UncopiedGradients((numel,), dtype, device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._input = _Input(numel, buffer if self._shards == 1 else None, stream)
        return buffer

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce-scatter `input_tensor` (N n,) into `output_tensor` (n,), on the current stream."""
        if self._wire_dtype is None:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        if op != dist.ReduceOp.SUM or async_op:
            raise RuntimeError(f"gradients travel in {self._wire_dtype} to be summed at once, got {op}")
        if isinstance(input_tensor, UncopiedGradients):
            assert self._exchange is not None
            received = self._exchange(input_tensor)
        else:
            received = self._all_to_all(input_tensor, group)
        squares = self._squares_of(output_tensor)
        sum_chunks(received, output_tensor, squares, alone=self._is_last)
        if squares is not None:
            remember(output_tensor, squares)
        return None

    def _squares_of(self, output: Tensor) -> Tensor | None:
        """Where the squares of `output` go, the same memory in each step; None if it becomes no gradient."""
        if not (self._adds_squares and self._becomes_gradient(output.dtype)):
            return None
        spans = -(-len(output) // SPAN)
        if self._squares is None or len(self._squares) != spans:
            self._squares = torch.empty(spans, dtype=torch.float32, device=output.device)
        return self._squares

    def _all_to_all(self, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What all ranks have for this one's shard, (N, n)."""
        received = _empty_of(self._compute_stream, sent.numel(), sent.dtype, sent.device)
        # The input's owner frees both when the compute stream has waited for what follows.
        sent.received = received  # type: ignore[attr-defined]
        dist.all_to_all_single(received, sent, group=group)
        return received.view(self._shards, -1)

    def _output(self, former: _Input, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._compute_stream = former.stream
        if self._wire_dtype is not None:
            dtype = torch.float32
        if not self._becomes_gradient(dtype):
            return torch.empty(numel, dtype=dtype, device=device)
        if former.tensor is not None and former.tensor.dtype == dtype:
            return former.tensor
        return _empty_of(former.stream, numel, dtype, device)

    def _becomes_gradient(self, dtype: torch.dtype) -> bool:
        """Whether slices of the output are what the optimizer will read, until `zero_grad`."""
        if self._temporary:
            return False
        # Sharded by now: in their own dtype, with the gradients of the step's former micro-batches.
        parameters = (p for module in self._unit for p in module.parameters())
        return all(p.grad is None and p.dtype == dtype for p in parameters)


def _empty_of(
    stream: torch.cuda.Stream | None, numel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory out of `stream`'s pool that the current stream may write to."""
    if stream is None:
        return torch.empty(numel, dtype=dtype, device=device)
    with torch.cuda.stream(stream):
        buffer = torch.empty(numel, dtype=dtype, device=device)
    # Also for the fill that deterministic algorithms add to `empty`.
    torch.cuda.current_stream(device).wait_stream(stream)
    return buffer
