"""Tensor parallelism: matrices split over the ``tp`` axis, the sequence split between them.

    residual stream   x      (B, S/tp, D)   each rank holds its own positions
    norm              y      (B, S/tp, D)   weight on every rank
    attention, feed_forward: their input is gathered once, for all columnwise linears inside
      columnwise      W (N/tp, K)    (B, S, D) -> (B, S, N/tp)     own heads, own hidden units
      rowwise         W (N, K/tp)    (B, S, K/tp) -> partial sums -> reduce-scatter -> (B, S/tp, D)
    embedding         W (V/tp, D)    own rows of the vocabulary -> reduce-scatter -> (B, S/tp, D)
    output            W (V/tp, D)    gathers its input -> logits (B, S, V/tp), a DTensor

(Shoeybi et al. 2019, arXiv 1909.08053; the sequence-parallel norms: Korthikanti et al. 2022, arXiv
2205.05198, section 4.2.2.) A block so has two gathers and two reduce-scatters forward, and the mirror of
each backward.

What each module is comes from the model's role table; how it is split may come from a converter
(`style_for`), module by module. Parameters become DTensors on the ``tp`` axis, which FSDP2 shards again.

Legend: B sequences, S positions, D model width, N and K out and in features, V vocabulary.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from parallelisms.blocks import matches

SEQUENCE = Shard(1)
"""Placement of activations between the split matrices."""

StyleFor = Callable[[str, nn.Module, str], ParallelStyle | None]


class SharedInputStyle(ParallelStyle):
    """A columnwise style that can say how the input it shares with its siblings is best gathered.

    It must also take what `GatherInput` gives: that is used where siblings want different things.
    """

    def shared_input(self, module: nn.Module) -> ParallelStyle | None:
        """The style for the parent's input; styles that compare equal serve one another."""
        return None


class GatherInput(ParallelStyle):
    """Gathers a module's first argument over the sequence, as a DTensor that all inside it use.

    As a DTensor, so that the gradients of all users are added as partial sums and reduce-scattered once.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = args
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, (SEQUENCE,), run_check=False)
            return (x.redistribute(placements=(Replicate(),)), *others)

        module.register_forward_pre_hook(gather)
        return module


class _FinishedOutput(ParallelStyle):
    """Gives a plain tensor where the style before it gives one whose collective is still under way.

    A compiled block drops the gradient of such an input (seen with torch 2.13: the embedding then learns
    nothing), so what enters the first block must be an ordinary tensor.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(lambda _, args, y: y.clone())
        return module


class _Logits(ParallelStyle):
    """Gives the logits as a DTensor of vocabulary shards, or gathered as a plain tensor."""

    def __init__(self, sharded: bool) -> None:
        self.sharded = sharded

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def finish(_: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
            if not isinstance(logits, DTensor):
                logits = DTensor.from_local(logits, device_mesh, (Shard(logits.dim() - 1),), run_check=False)
            return logits if self.sharded else logits.redistribute(placements=(Replicate(),)).to_local()

        module.register_forward_hook(finish)
        return module


def apply_tensor_parallel(
    model: nn.Module,
    roles: Mapping[str, str],
    tp_mesh: DeviceMesh,
    *,
    style_for: StyleFor = lambda fqn, module, role: None,
    loss_parallel: bool = True,
) -> str:
    """Split `model` over `tp_mesh` as its role table says.

    Args:
        model: On ``meta``, or the same weights on every rank; converted, not yet wrapped by anything.
        roles: FQN pattern -> role, as in `models.spec`.
        tp_mesh: The one-dimensional ``tp`` part of the device mesh.
        style_for: (FQN, module, role) -> the style that a converter wants there, or None for the plain one.
        loss_parallel: Leave the logits sharded over the vocabulary, for `trainer.loss`.

    Returns:
        What was done, for the start-up log; empty where one rank holds everything.

    Raises:
        ValueError: a pattern matches no module.
    """
    if tp_mesh.size() == 1:
        return ""
    counts: Counter[str] = Counter()
    gathered: dict[str, list[tuple[nn.Module, ParallelStyle]]] = defaultdict(list)
    planned: list[tuple[nn.Module, ParallelStyle]] = []
    for fqn, module, role in _modules_by_role(model, roles):
        own = style_for(fqn, module, role)
        style = own or _plain_style(role)
        planned.append((module, style))
        counts["norms" if role == "norm" else "matrices"] += 1
        counts["converted"] += own is not None
        if role in ("columnwise", "output"):
            # The input is gathered where siblings share it: at the module that holds them.
            parent = fqn.rpartition(".")[0] if role == "columnwise" else fqn
            gathered[parent or fqn].append((module, style))
        if role == "embedding":
            planned.append((module, _FinishedOutput()))
        if role == "output":
            planned.append((module, _Logits(loss_parallel)))
    inputs = [(model.get_submodule(fqn), _gather_style(users)) for fqn, users in gathered.items()]
    # Gathers come first: hooks of one module run in the order in which they were registered.
    for module, style in [*inputs, *planned]:
        # src_data_rank=None: every rank holds the same weights (or none yet), so nothing is sent.
        parallelize_module(module, tp_mesh, style, src_data_rank=None)
    if callable(tie := getattr(model, "tie_output", None)):
        tie()  # parameters were replaced one module at a time
    counts["gathers"] = len(inputs)
    counts["own_gathers"] = sum(not isinstance(style, GatherInput) for _, style in inputs)
    return _describe(tp_mesh.size(), counts, loss_parallel)


def apply_async_tensor_parallel(tp_mesh: DeviceMesh, wanted: bool) -> str:
    """Let the compiler split each gather and its matmul, and each matmul and its scatter, to overlap them.

    Inductor's pass fuses what it recognises in a compiled block (all-gather + mm, mm + reduce-scatter) into
    pipelined kernels over symmetric memory, which needs GPUs that reach one another's memory. (The idea:
    Wang et al. 2023, "Overlap communication with dependent computation via decomposition", ASPLOS.)

    Returns:
        What was done, for the start-up log; empty where nothing is split or asked for.
    """
    if not wanted or tp_mesh.size() == 1:
        return ""
    if tp_mesh.device_type != "cuda":
        return f"asynchronous tensor parallel: no effect on {tp_mesh.device_type} (no symmetric memory)"
    import torch._inductor.config as inductor

    inductor._micro_pipeline_tp = True
    return "asynchronous tensor parallel: the compiler overlaps gathers and scatters with their matmuls"


def _describe(ranks: int, counts: Counter[str], loss_parallel: bool) -> str:
    converted = f" ({counts['converted']} by a converter's style)" if counts["converted"] else ""
    special = f", {counts['own_gathers']} of them as a converter says" if counts["own_gathers"] else ""
    return (
        f"tensor parallel over {ranks}: {counts['matrices']} matrices split{converted}, "
        f"{counts['norms']} norms sequence-parallel, {counts['gathers']} gathered inputs{special}; "
        f"logits {'sharded over the vocabulary' if loss_parallel else 'gathered'}"
    )


def _modules_by_role(model: nn.Module, roles: Mapping[str, str]) -> list[tuple[str, nn.Module, str]]:
    """(FQN, module, role) of every module that a pattern names."""
    named = dict(model.named_modules())
    found: list[tuple[str, nn.Module, str]] = []
    for pattern, role in roles.items():
        hits = [(fqn, module, str(getattr(role, "value", role))) for fqn, module in named.items()]
        hits = [hit for hit in hits if matches(pattern, hit[0])]
        if not hits:
            near = difflib.get_close_matches(pattern, named, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"tensor parallel: the role pattern {pattern!r} matches no module{hint}")
        found += hits
    return found


def check_roles(model: nn.Module, roles: Mapping[str, str]) -> None:
    """Raise where a pattern of `roles` matches no module of the whole `model`.

    Raises:
        ValueError: with the nearest name.
    """
    _modules_by_role(model, roles)


def roles_within(model: nn.Module, roles: Mapping[str, str]) -> dict[str, str]:
    """The part of a role table that concerns a pipeline stage: patterns that match something in it."""
    names = [fqn for fqn, _ in model.named_modules()]
    return {pattern: role for pattern, role in roles.items() if any(matches(pattern, fqn) for fqn in names)}


def _plain_style(role: str) -> ParallelStyle:
    if role == "embedding":
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE)
    if role == "columnwise":
        return ColwiseParallel(input_layouts=Replicate())
    if role == "rowwise":
        return RowwiseParallel(output_layouts=SEQUENCE)
    if role == "norm":
        return SequenceParallel()
    if role == "output":
        return ColwiseParallel(input_layouts=Replicate(), use_local_output=False)
    raise ValueError(f"tensor parallel: no style for the role {role!r}")


def _gather_style(users: list[tuple[nn.Module, ParallelStyle]]) -> ParallelStyle:
    """What all users of a gathered input ask for, where they agree; else the plain gather."""
    asked = [
        style.shared_input(module) if isinstance(style, SharedInputStyle) else None for module, style in users
    ]
    first = asked[0]
    return first if first is not None and all(other == first for other in asked) else GatherInput()
