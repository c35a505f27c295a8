"""Amaxes in a compiled graph, told apart by what they are taken of."""

import operator

import torch

aten = torch.ops.aten


def amaxes(graph):
    """All of them: also a softmax's, by row, where attention is plain math."""
    return [node for node in graph.nodes if node.target is aten.amax.default]


def amaxes_kernels_could_give(graph):
    """Those of the magnitudes of all that an operator with a switch `with_amax` made, seen in any shape."""
    return [node for node in amaxes(graph) if _of_everything(node) and _is_made_by_one(node.args[0])]


def _of_everything(amax):
    whole = len(amax.args) == 1 or list(amax.args[1]) == []
    return whole and amax.args[0].target is aten.abs.default


def _is_made_by_one(magnitude):
    node = magnitude.args[0]
    size = node.meta["val"].numel()
    while isinstance(node.target, torch._ops.OpOverload) and (
        node.target.is_view or node.target in (aten.clone.default, aten._unsafe_view.default)
    ):
        node = node.args[0]
    if node.target is not operator.getitem or node.meta["val"].numel() != size:
        return False
    producer = node.args[0].target
    switches = producer._schema.arguments if isinstance(producer, torch._ops.OpOverload) else ()
    return any(switch.name == "with_amax" for switch in switches)
