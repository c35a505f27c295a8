"""A pass over compiled graphs: a scale comes with its cast, and an amax too if nothing takes it on its way.

A float8 linear with dynamic scales and Triton's casts takes a tensor's amax, makes the scale, and casts:

    scale = to_fp32(448 / max(to_fp64(amax(abs(t))), 1e-12))
    x8, x8t = cast_both(t, scale, e4m3)                       inverse = to_fp32(1 / to_fp64(scale))

Where an op made t that the compiler can fuse with (an addition, a product), it takes the amax in that op's
kernel, makes the scale in a second one that it needs anyway, and the pass leaves both alone. Where nothing
can be fused with t, because it came from outside the graph or a GEMM, attention, a collective or a kernel of
`kernels` made it, the amax reads all of t, a small kernel makes the scales, and other kernels may run before
the cast reads t again. There it becomes

    x8, x8t, scale, inverse = scale_and_cast_both(t, e4m3)

to the same bits: `kernels.triton.amax` says what that saves. And where a kernel of ours has given the amax
with t (`parallelisms.amax_pass`), the kernel that makes the scale takes a microsecond or two, between two
kernels that wait for it, 256 times in a step of Llama 3 8B: there it becomes

    x8, x8t, scale, inverse = scale_and_cast_both(t, e4m3, amax)

Only amaxes that feed `cast_both` are touched, so a model on PyTorch's casts, or on another library's,
compiles as it would without the pass. So do scales that are rounded to powers of two, recorded (delayed
scaling), reduced over ranks, or of two formats.

Graphs are those of torch 2.11 to 2.13 after decomposition; in one that looks otherwise nothing is replaced,
and tests count what is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from kernels import cast  # noqa: F401  (it defines the operators)
from kernels.scaling import MIN_AMAX, float8_max
from parallelisms.amax_pass import SAME_ELEMENTS, given, measured_by

_aten, _octavo = torch.ops.aten, torch.ops.octavo
_convert = torch.ops.prims.convert_element_type.default

_VIEWS = SAME_ELEMENTS - {_aten.clone.default}
"""Of all elements, without a copy: a copy is a kernel that an amax can be fused with."""
_GEMMS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_mm.default,
}
_ATTENTION = "aten::_scaled_dot_product_"


class Found(NamedTuple):
    """What makes a cast's scale."""

    scale: Node
    inverses: list[Node]
    steps: list[Node]
    """All that is not needed any more, users first."""
    amax: Node | None
    """The scale's, an fp32 scalar, where it is at hand."""


class ScaleWithCast(CustomGraphPass):
    """Replaces cast_both(t, scale) by scale_and_cast_both where t's amax is a pass of its own, or at hand."""

    def __call__(self, graph: Graph) -> None:
        """Change `graph` in place."""
        order = {node: number for number, node in enumerate(graph.nodes)}
        for node in list(graph.nodes):
            if node.target is _octavo.cast_both.default and (found := _scale_of(node)):
                users = [user for made in (found.scale, *found.inverses) for user in made.users]
                if all(user in found.steps or order[user] >= order[node] for user in users):
                    _replace(graph, node, found)

    def uuid(self) -> bytes:
        """What the cache of compiled graphs knows this pass by."""
        return get_hash_for_files((__file__,))


def _scale_of(cast_both: Node) -> Found | None:
    """What makes the scale of `cast_both`, if the amax is given, or t's own and a pass over it."""
    t, scale, dtype = cast_both.args
    quotient = _argument(scale, _convert, torch.float32)
    if quotient is None or quotient.target is not _aten.div.Tensor or quotient.kwargs:
        return None
    largest, clamped = quotient.args
    wide = _argument(clamped, _aten.clamp_min.default, MIN_AMAX)
    amax = _argument(wide, _convert, torch.float64)
    if amax is None or not _is_full(largest, float8_max(dtype)):
        return None
    at_hand = given(amax) if t.meta["val"].itemsize == 2 else None
    if at_hand is None and not _stands_alone_with(t, amax):
        return None
    chain = [quotient, clamped, wide, amax] if at_hand else [quotient, clamped, wide, amax, amax.args[0]]
    if any(len(node.users) != 1 for node in chain):
        return None
    inverses = list(_inverses_of(scale))
    steps = [node for steps in inverses for node in steps]
    return Found(scale, [steps[0] for steps in inverses], [*steps, scale, *chain, largest], at_hand)


def _stands_alone_with(t: Any, amax: Node) -> bool:
    """Whether `amax` is that of all of t, and has to read it."""
    measured = measured_by(amax)
    return measured is not None and _base(measured) is _base(t) and _stands_alone(_base(t))


def _inverses_of(scale: Node) -> Iterator[tuple[Node, Node, Node]]:
    """(fp32(1 / s), 1 / s, fp64(s)) wherever `scale` is inverted for a GEMM, and only for that."""
    for wide in scale.users:
        if _argument(wide, _convert, torch.float64) is None or len(wide.users) != 1:
            continue
        (reciprocal,) = wide.users
        if _argument(reciprocal, _aten.reciprocal.default) is None or len(reciprocal.users) != 1:
            continue
        (inverse,) = reciprocal.users
        if _argument(inverse, _convert, torch.float32) is not None:
            yield inverse, reciprocal, wide


def _argument(node: Any, target: Any, *rest: Any) -> Node | None:
    """The first argument of `node`, if that is a call of `target` with `rest` for the others."""
    if not isinstance(node, Node) or node.target is not target or node.args[1:] != rest or node.kwargs:
        return None
    return node.args[0]


def _is_full(node: Any, value: float) -> bool:
    return (
        isinstance(node, Node)
        and node.target is _aten.full.default
        and tuple(node.args) == ([], value)
        and node.kwargs.get("dtype") is torch.float64
    )


def _base(node: Any) -> Any:
    while isinstance(node, Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _stands_alone(node: Any) -> bool:
    """Whether no reduction of `node` can be fused with what makes it."""
    if not isinstance(node, Node):
        return False
    if node.target is operator.getitem:
        node = node.args[0]
    target = node.target
    if node.op == "placeholder" or isinstance(target, HigherOrderOperator):
        return True
    if not isinstance(target, OpOverload):
        return False
    if target.namespace in ("aten", "prims"):
        return target in _GEMMS or target._schema.name.startswith(_ATTENTION)
    return True


def _replace(graph: Graph, cast_both: Node, found: Found) -> None:
    t, scale, dtype = cast_both.args
    scalar = scale.meta["val"]
    with graph.inserting_before(cast_both):
        arguments = (t, dtype) if found.amax is None else (t, dtype, found.amax)
        both = graph.call_function(_octavo.scale_and_cast_both.default, arguments)
        both.meta["val"] = (*cast_both.meta["val"], scalar, scalar.clone())
        scalars = [graph.call_function(operator.getitem, (both, place)) for place in (2, 3)]
    for node, value in zip(scalars, both.meta["val"][2:], strict=True):
        node.meta["val"] = value
    cast_both.replace_all_uses_with(both)
    graph.erase_node(cast_both)
    scale.replace_all_uses_with(scalars[0])
    for inverse in found.inverses:
        inverse.replace_all_uses_with(scalars[1])
    for node in (*found.steps, *scalars):
        if not node.users:
            graph.erase_node(node)
