"""Peak memory of a rank: one step, replayed allocation by allocation.

The CUDA allocator keeps a pool for each stream: what one stream freed, another cannot use. FSDP2 allocates
on three:

    main      parameters, optimizer state, activations, logits, gathered weights, unsharded gradients
    gather    all-gather buffers (the next unit's beside the present one's), and float8 shards that are kept
    reduce    the results of reduce-scatters, which are the sharded gradients; with another
              `parallelism.fsdp_reduce_scatter` than torch's, those that become gradients are in the main pool

So what the device must hold (the allocator's *reserved* bytes, which the step line logs) is the sum of the
pools' own peaks, though they are not reached at the same time: gradients grow while activations go, in
another pool. The replay keeps both figures, the sum of peaks and the peak of the sum (*allocated*).

The order of events is FSDP2's (torch.distributed.fsdp, 2.11 to 2.13):

    forward    gather unit, copy out, run, free it (unless it stays); its gather buffer lives until the next
               copy-out
    loss       logits in the compute dtype; compiled, their gradient besides; eager, three copies in fp32
    backward   gather unit, run, free it; wait for the former unit's reduce-scatter and free its input; copy
               the gradients into this unit's input (fp32, whole); reduce-scatter into the sharded gradients

The embedding's backward reads no weight, so it is not gathered there. Gradients that travel in bf16 have an
input of half the size, and as much again for what is received.

With copies between GPUs (`parallelisms.fsdp_copies`) there are two pools more:

    peer       memory that other GPUs copy from or to, for good: the largest unit's gradients as received;
               where weights stay, two pieces for the shards on their way. Not the allocator's, but logged
    arrival    a unit's weights when they are gathered for the first time, with no place to lie in yet; these
               buffers follow each other as those in the gather pool do, which has nothing but kept shards

From then on weights lie in the main pool, in backward and after it too. A unit's gradients have no input:
they stay as backward left them until the next unit's reduction, as an input does.

On one shard there is nothing to gather: weights are cast in the main pool. The reduce pool is there all the
same, unless the input itself becomes the gradient; with replicas, a division takes room for one unit more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

GIB = 2**30
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits and loss",
    "gathered weights",
    "gradient buffers",
    "workspaces",
)
WORKSPACE_BYTES = 2 * 32 * 2**20
"""cuBLAS asks for 32 MiB on Hopper, once in forward's thread and once in backward's."""
_MAIN, _GATHER, _REDUCE = "main", "gather", "reduce"
_PEER, _ARRIVAL = "peer", "arrival"
"""Pools of runs with copies between GPUs alone."""
_FP32 = 4


class Ledger:
    """What is allocated in each pool, and what was at that pool's peak."""

    def __init__(self) -> None:
        self._held: dict[str, Counter[str]] = {pool: Counter() for pool in (_MAIN, _GATHER, _REDUCE)}
        self.at_peak: dict[str, Counter[str]] = {pool: Counter() for pool in self._held}
        self.allocated_peak = 0

    def alloc(self, category: str, size: int, pool: str = _MAIN) -> None:
        """Take `size` bytes."""
        held = self._held.setdefault(pool, Counter())
        held[category] += size
        if held.total() > self.at_peak.setdefault(pool, Counter()).total():
            self.at_peak[pool] = held.copy()
        self.allocated_peak = max(self.allocated_peak, sum(pool.total() for pool in self._held.values()))

    def free(self, category: str, size: int, pool: str = _MAIN) -> None:
        """Give `size` bytes back to their pool."""
        self._held[pool][category] -= size
        assert self._held[pool][category] >= 0, (category, pool, self._held)

    def touch(self, category: str, size: int, pool: str = _MAIN) -> None:
        """Take and give back."""
        self.alloc(category, size, pool)
        self.free(category, size, pool)


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers as one."""

    name: str
    gathered_bytes: int
    """Of its weights, whole (after tensor parallelism), as they are gathered."""
    local_numel: int
    """Elements of the same."""
    shard_numel: int
    """Elements that this rank keeps."""
    stays: bool
    """Not freed between forward and backward."""
    saved_bytes: int = 0
    """Activations of one forward."""
    working_bytes: int = 0
    """What its backward needs besides."""
    backward_reads_weights: bool = True
    """Gathered for backward."""
    float8_shard_numel: int = 0
    """Those of `shard_numel` that are cast to travel in float8."""


@dataclass(frozen=True)
class Reduction:
    """How a unit's gradients are summed over the shards; see `parallelisms.fsdp_comm`."""

    wire_bytes: int = _FP32
    """Of one element on its way."""
    in_compute_pool: bool = False
    """Sums that become gradients are in the main pool, and over one shard they are the input itself."""
    divides: bool = False
    """Over one shard, torch divides by a factor on the way from input to output."""
    copies_bytes: int = 0
    """Of weights in the compute dtype that last over steps; gradients then stay where backward left them.
    See `parallelisms.direct_weights`; units gather nothing."""
    widens: bool = False
    """These gradients are cast to the parameters' dtype after backward."""
    peer_bytes: int = 0
    """Of the peer memory that gradients are copied into, from where backward left them."""


@dataclass(frozen=True)
class StepShape:
    """All sizes that the replay needs, of one rank."""

    units: tuple[Unit, ...]
    """In forward order."""
    parameter_bytes: int
    optimizer_bytes: int
    fsdp_degree: int
    in_flight: int
    """Forwards whose activations are there at once."""
    accumulates: bool
    """Several backwards a step, each with a reduction: gradients exist while the last one runs."""
    whole_gradients: bool
    """A pipeline's: summed whole over its micro-batches, and reduced once."""
    logits_bytes: int
    """On this rank, of one forward, in the compute dtype; 0 where another stage has the output."""
    loss_forward_bytes: int
    """What the loss takes besides."""
    loss_saved_bytes: int
    """What it keeps for backward."""
    loss_backward_bytes: int
    """What its backward takes besides, the logits' gradient included."""
    compute_bytes: int
    """Of one element in forward and backward."""
    master_bytes: int
    """Of one element of the parameters and their gradients, once reduced."""
    offloaded: bool
    """Parameters, gradients and optimizer live in host memory."""
    reduction: Reduction = Reduction()
    kept_shards_bytes: int = 0
    """Of float8 shards that are cast once a step, `quantize.linear.float8.keep_float8_shards`."""
    peer_weight_bytes: int = 0
    """Of the peer memory that shards are copied from, to whole weights that last over steps."""


@dataclass(frozen=True)
class MemoryPlan:
    """A rank's peak."""

    by_category: dict[str, int]
    """Bytes at the pools' peaks; they sum to `reserved_bytes`."""
    by_pool: dict[str, int]
    """Those that `replay` has, and with copies between GPUs `peer` and `arrival`."""
    allocated_bytes: int
    """Peak of what tensors hold at one time."""
    host_bytes: int = 0
    """In host memory, under CPU offload."""
    stage: int = 0
    """Pipeline rank that it is of."""
    notes: list[str] = field(default_factory=list)

    @property
    def reserved_bytes(self) -> int:
        """What the device must have."""
        return sum(self.by_pool.values())


def replay(step: StepShape) -> MemoryPlan:
    """The peak of a training step once optimizer state exists."""
    ledger = Ledger()
    persistent = 0 if step.offloaded else 1
    ledger.alloc("workspaces", WORKSPACE_BYTES)
    ledger.alloc("parameters", step.parameter_bytes * persistent)
    ledger.alloc("optimizer", step.optimizer_bytes * persistent)
    ledger.alloc("gathered weights", step.reduction.copies_bytes)
    ledger.alloc("gathered weights", step.kept_shards_bytes, _GATHER if step.fsdp_degree > 1 else _MAIN)
    if step.reduction.peer_bytes:
        ledger.alloc("gradient buffers", step.reduction.peer_bytes, _PEER)
    if step.peer_weight_bytes:
        step = _gather_for_good(ledger, step)
    _forward(ledger, step)
    if step.whole_gradients:
        _pipeline_backward(ledger, step)
    else:
        _loss(ledger, step)
        _backward(ledger, step, gradients=False)
        if step.accumulates:
            _forward(ledger, step)
            _loss(ledger, step)
            _backward(ledger, step, gradients=True)
    by_category: Counter[str] = Counter()
    for pool in ledger.at_peak.values():
        by_category += pool
    host = step.parameter_bytes * 2 + step.optimizer_bytes if step.offloaded else 0
    return MemoryPlan(
        {category: by_category[category] for category in CATEGORIES},
        {name: pool.total() for name, pool in ledger.at_peak.items()},
        ledger.allocated_peak,
        host,
    )


def _gather_for_good(ledger: Ledger, step: StepShape) -> StepShape:
    """The first step's gathers by copies; returns the shape of a later step, which takes no more for them."""
    ledger.alloc("gathered weights", step.peer_weight_bytes, _PEER)
    buffer = 0
    for unit in step.units:
        buffer = _gather(ledger, step, unit, buffer, _ARRIVAL)
    ledger.free("gathered weights", buffer, _ARRIVAL)
    return replace(step, units=tuple(replace(unit, gathered_bytes=0) for unit in step.units))


def _gather(ledger: Ledger, step: StepShape, unit: Unit, held: int, pool: str = _GATHER) -> int:
    """Gather a unit into the main pool; returns the size of the buffer that stays until the next copy-out."""
    if step.fsdp_degree > 1:
        ledger.alloc("gathered weights", unit.gathered_bytes, pool)
        ledger.free("gathered weights", held, pool)
    ledger.alloc("gathered weights", unit.gathered_bytes)
    return unit.gathered_bytes if step.fsdp_degree > 1 else 0


def _forward(ledger: Ledger, step: StepShape) -> None:
    buffer = 0
    for unit in step.units:
        buffer = _gather(ledger, step, unit, buffer)
        ledger.alloc("activations", unit.saved_bytes * step.in_flight)
        if not unit.stays:
            ledger.free("gathered weights", unit.gathered_bytes)
    ledger.free("gathered weights", buffer, _GATHER)


def _loss(ledger: Ledger, step: StepShape) -> None:
    """Forward and backward of the loss; what is left is the gradient of the logits."""
    ledger.alloc("logits and loss", step.logits_bytes)
    ledger.touch("logits and loss", step.loss_forward_bytes)
    kept = step.loss_saved_bytes - step.logits_bytes
    if kept >= 0:
        ledger.alloc("logits and loss", kept)
    ledger.touch("logits and loss", step.loss_backward_bytes)
    ledger.free("logits and loss", max(kept, 0))  # the gradient takes the place of the logits


def _backward(ledger: Ledger, step: StepShape, gradients: bool) -> None:
    """`gradients` tells that those of an earlier backward are there."""
    former = 0
    for unit in reversed(step.units):
        if not unit.stays and unit.backward_reads_weights:
            if step.fsdp_degree > 1:
                ledger.touch("gathered weights", unit.gathered_bytes, _GATHER)
            ledger.alloc("gathered weights", unit.gathered_bytes)
        whole = _run_backward(ledger, step, unit)
        if unit.stays or unit.backward_reads_weights:
            ledger.free("gathered weights", unit.gathered_bytes)
        if step.reduction.copies_bytes == 0:
            former = _reduce(ledger, step, unit, whole, former, gradients)
    ledger.free("gradient buffers", former)
    if step.reduction.widens:
        for unit in step.units:
            ledger.alloc("gradients", unit.shard_numel * step.master_bytes)
            ledger.free("gradient buffers", unit.local_numel * step.compute_bytes)


def _run_backward(ledger: Ledger, step: StepShape, unit: Unit) -> int:
    """One unit's own work; returns the size of its gradients, whole and in the compute dtype."""
    whole = unit.local_numel * step.compute_bytes
    ledger.alloc("gradient buffers", whole)
    ledger.touch("activations", unit.working_bytes)
    if unit is step.units[-1]:
        ledger.free("logits and loss", step.logits_bytes)
    ledger.free("activations", unit.saved_bytes)
    return whole


def _pipeline_backward(ledger: Ledger, step: StepShape) -> None:
    """The first micro-batch makes whole gradients, the last one finds them; then all are reduced."""
    _loss(ledger, step)
    for unit in reversed(step.units):
        whole = _run_backward(ledger, step, unit)
        ledger.alloc("gradients", unit.local_numel * _FP32)
        ledger.free("gradient buffers", whole)
    for unit in step.units:  # weights stay gathered
        ledger.alloc("activations", unit.saved_bytes)
    _loss(ledger, step)
    for unit in reversed(step.units):
        ledger.free("gradient buffers", _run_backward(ledger, step, unit))
        ledger.free("activations", unit.saved_bytes * (step.in_flight - 1))
    former = 0
    for unit in reversed(step.units):
        ledger.free("gathered weights", unit.gathered_bytes)
        former = _reduce(ledger, step, unit, 0, former, gradients=False)
        ledger.free("gradients", unit.local_numel * _FP32)
    ledger.free("gradient buffers", former)


def _reduce(ledger: Ledger, step: StepShape, unit: Unit, whole: int, former: int, gradients: bool) -> int:
    """Reduce-scatter a unit's gradients; returns the size of what waits for the next unit."""
    ledger.free("gradient buffers", former)
    how, alone = step.reduction, step.fsdp_degree == 1
    if how.peer_bytes:  # the gradients themselves are what waits
        size = whole
    else:
        size = unit.local_numel * how.wire_bytes
        ledger.alloc("gradient buffers", size)
        ledger.free("gradient buffers", whole)
    reduced, result = unit.shard_numel * _FP32, unit.shard_numel * step.master_bytes
    pooled = how.in_compute_pool and not gradients
    if pooled and alone:  # the input is the result
        ledger.free("gradient buffers", size)
    ledger.alloc("gradients", reduced, _MAIN if pooled else _REDUCE)
    if how.divides:
        ledger.touch("gradient buffers", reduced, _REDUCE)
    if pooled and alone:
        return 0
    if not pooled:
        if result < reduced:  # summed in fp32, kept in the parameters' dtype
            ledger.alloc("gradients", result, _REDUCE)
            ledger.free("gradients", reduced, _REDUCE)
        if gradients or step.offloaded:
            ledger.free("gradients", result, _REDUCE)  # added to what is there, or copied to the host
    if how.wire_bytes < _FP32 and not how.peer_bytes:
        ledger.alloc("gradient buffers", size)  # what is received
        return 2 * size
    return size
