"""L2 norms of many tensors in one pass over them: what clipping needs to know of the gradients.

    norm = sqrt(sum of x^2), in fp32; each tensor has its own

Bytes: an element is read once, 4 of an fp32 gradient and 2 of a bf16 one, and nothing but the norms and a sum
for each 32 KiB is written. torch's `_foreach_norm` reads as many, but in 138 launches for 2.8 G bf16
gradients in 74 tensors: 2.67 ms on an H100, where the bytes at 3.0 TB/s take 1.9 ms. The two launches here
take 3.50 ms for 4.0 G fp32 gradients on an H200: 4.6 TB/s.

On a CPU the norms are fp64: an fp32 sum over a large tensor is off there in the fifth digit, by an amount
that depends on how the tensor is sharded, and then no two layouts would clip alike. A GPU sums in a tree, to
which fp32 is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.operators import operator
from kernels.support import runs_triton

_DTYPES = (torch.float32, torch.bfloat16)


@operator("tensor_norms")
def tensor_norms(tensors: list[Tensor]) -> Tensor:
    """Norms of P tensors, (P,): fp64 of those on a CPU, fp32 of others.

    Args:
        tensors: At least one, of one device and dtype, of any shape, also empty. NaN and infinities are those
            of the sum of squares.

    Raises:
        ValueError: there is none, or a dtype or a device is another.
    """
    if len({(t.device, t.dtype) for t in tensors}) != 1:
        raise ValueError(f"tensor_norms: {len(tensors)} tensors, not of one device and dtype")
    if runs_triton(tensors[0].device) and tensors[0].dtype in _DTYPES:
        from kernels.triton.norm import launch

        return launch(tensors)
    return tensor_norms_reference(tensors)


@tensor_norms.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=_norm_dtype(tensors[0].device))


def tensor_norms_reference(tensors: list[Tensor]) -> Tensor:
    """As `tensor_norms`, by torch."""
    return torch.stack(torch._foreach_norm(tensors, 2.0, _norm_dtype(tensors[0].device)))


def _norm_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32
