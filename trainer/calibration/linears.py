"""Forward + backward of one linear, plain and float8, with operands as a step has them.

X (M, K) and dY (M, N) are normal random numbers and W (N, K) is as `nn.Linear` initialises it, all in the
compute dtype: a GEMM of zeros draws less power and runs faster than one of numbers. Both gradients are
computed and none is accumulated. The linear stands alone: what a block saves by sharing a cast (wq, wk and wv
read one input) or by taking an amax in the kernel before is not in its time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from converters.float8.config import Float8LinearConfig
from converters.float8.convert import convert_to_float8_training
from parallelisms.compile import compiler_options
from trainer.calibration.timing import Times, Work, time_in_turns

PLAIN = "plain"
"""Name of `nn.Linear` among the variants."""


class Shape(NamedTuple):
    """Sizes of a linear as one device computes it."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        """Of the three GEMMs."""
        return 6.0 * self.m * self.k * self.n


@dataclass(frozen=True)
class Operands:
    """What goes into a linear's forward and backward."""

    x: Tensor
    """(M, K), a leaf that wants its gradient."""
    dy: Tensor
    """(M, N)."""


def make_operands(shape: Shape, device: torch.device, dtype: torch.dtype) -> Operands:
    """Random operands, equal for equal shapes."""
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (
        torch.randn(shape.m, columns, device=device, dtype=dtype, generator=generator)
        for columns in (shape.k, shape.n)
    )
    return Operands(x.requires_grad_(), dy)


def plain_linear(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """A linear without bias, equal for equal shapes."""
    torch.manual_seed(0)
    return nn.Linear(shape.k, shape.n, bias=False, device=device, dtype=dtype)


def float8_linear(
    shape: Shape, device: torch.device, dtype: torch.dtype, config: Float8LinearConfig
) -> nn.Module:
    """The same linear in float8.

    Raises:
        ValueError: the device has no such GEMMs, or the shape needs `pad_inner_dim`.
    """
    linear = plain_linear(shape, device, dtype)
    if not config.pad_inner_dim and (shape.k % 16 or shape.n % 16):
        raise ValueError(f"K = {shape.k} and N = {shape.n} must be divisible by 16, or pad_inner_dim set")
    return convert_to_float8_training(linear, config=config)


def forward_and_backward(module: nn.Module, operands: Operands, *, compiled: bool) -> Work:
    """A function that runs `module` forward and backward once.

    Compiled as blocks are, whose graph passes know Octavo's linears alone, but for exactly these sizes:
    `torch.compile` otherwise turns sizes that change into variables.
    """
    forward: nn.Module = module
    if compiled:
        options = compiler_options("inductor")
        forward = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    parameters = [operands.x, *module.parameters()]

    return lambda: torch.autograd.grad(forward(operands.x), parameters, operands.dy)


def time_linears(
    modules: Mapping[str, nn.Module],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: Collection[str] = (),
    repetitions: int = 30,
) -> dict[str, Times]:
    """Time variants of one linear in turns; those that `compiled` names go through the compiler."""
    forget_compiled()
    operands = make_operands(shape, device, dtype)
    works = {
        name: forward_and_backward(module, operands, compiled=name in compiled)
        for name, module in modules.items()
    }
    return time_in_turns(works, device, repetitions)


def forget_compiled() -> None:
    """Make room for the compiled forms of another shape.

    Dynamo limits the versions of one function and runs what exceeds them uncompiled. All variants of a linear
    are versions of the same functions, and those of former shapes are not needed any more.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the host, had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
