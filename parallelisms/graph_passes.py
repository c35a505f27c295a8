"""The passes over graphs that inductor is given, as the one that it takes.

First `parallelisms.addition_pass`, which has norms' kernels add; then `parallelisms.amax_pass`, which takes
amaxes from the kernels that make tensors; then `parallelisms.scale_pass`, which has those that are left over
taken with the cast, and all scales made there.
"""

from __future__ import annotations

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from parallelisms.addition_pass import AdditionsInNorm
from parallelisms.amax_pass import AMAX_FROM_PRODUCER
from parallelisms.scale_pass import ScaleWithCast


class GraphPasses(CustomGraphPass):
    """All of them, in their order, over every forward and every backward graph after they are split."""

    passes = (AdditionsInNorm(), AMAX_FROM_PRODUCER, ScaleWithCast())

    def __call__(self, graph: Graph) -> None:
        """Change `graph` in place."""
        for each in self.passes:
            each(graph)

    def uuid(self) -> bytes:
        """What the cache of compiled graphs knows them by."""
        return b"".join(each.uuid() for each in self.passes)


GRAPH_PASSES = GraphPasses()
"""One for all: functions compiled with equal options share what they compile."""
