"""Operators of the ``octavo`` namespace: what a compiler sees as one node, and runs as Python.

`torch.library.custom_op` puts three Python functions between a caller and a kernel: for autograd, for what is
written in place, and one that checks that no output is an input. On an idle CPU that is 8 us of the 11 that a
call costs; a block of Llama makes some 30 calls a step, and where a host is slow the GPU waits for it. An
operator that writes to none of its arguments needs none of them, so `operator` registers its function
itself. One that does write takes `custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("octavo", "FRAGMENT")


class Operator:
    """A function as an operator; made by `operator`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = f"octavo::{name}"
        self.__doc__ = function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.octavo, name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.overload(*args, **kwargs)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say what it returns, without data; a decorator."""
        return torch.library.register_fake(self._name, function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """Say how it is differentiated, as `torch.library.register_autograd` wants to be told."""
        torch.library.register_autograd(self._name, backward, setup_context=setup_context, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function of typed arguments, to none of which it writes, as ``octavo::name``; a decorator.

    What it returns is new memory. A caller that wants gradients needs `Operator.register_autograd`.
    """
    return lambda function: Operator(name, function)
