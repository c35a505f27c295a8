"""Sum chunks of 16-bit numbers in fp32: what is left of a reduce-scatter when the numbers have travelled.

    out_j = ((0 + chunks_0j) + chunks_1j) + ... + chunks_(N-1)j        chunks (N, n) bf16 -> out (n,) fp32

`parallelisms.fsdp_comm` receives a chunk from each of N ranks. Bytes an element of `out`: 2 N read, 4
written.

The Triton form adds in this order whatever N and n are: the same chunks give the same bits. torch's sum has
an order of its own. Over two chunks both have the same bits (-0 and -0 give 0), over more they agree to the
roundings of their additions, N 2^-24 of the sum of magnitudes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.support import runs_triton

_DTYPES = (torch.bfloat16, torch.float16)


def sum_chunks_reference(chunks: Tensor, out: Tensor) -> None:
    """The sum in plain PyTorch."""
    torch.sum(chunks, dim=0, dtype=torch.float32, out=out)


@torch.library.custom_op("octavo::sum_chunks", mutates_args=("out",))
def sum_chunks(chunks: Tensor, out: Tensor) -> None:
    """Write the sum of `chunks` over dim 0 into `out`, on the current stream.

    Args:
        chunks: (N, n), bf16 or fp16, contiguous, N >= 1. n and where they begin may be anything; accesses are
            wide where both are multiples of 16, elements and bytes.
        out: (n,) fp32, contiguous, none of the chunks' memory.

    Raises:
        ValueError: a dtype, a size, a layout or a device is another.
    """
    _check(chunks, out)
    if not runs_triton(out.device):
        sum_chunks_reference(chunks, out)
        return
    from kernels.triton.sum_chunks import launch

    launch(chunks, out)


@sum_chunks.register_fake
def _(chunks: Tensor, out: Tensor) -> None:
    return None


def _check(chunks: Tensor, out: Tensor) -> None:
    """Raise ValueError for what a kernel that is given addresses would not notice."""
    if chunks.dim() != 2 or not chunks.shape[0] or chunks.shape[1:] != out.shape:
        raise ValueError(f"sum_chunks: {tuple(chunks.shape)} do not add up to {tuple(out.shape)}")
    if chunks.dtype not in _DTYPES or out.dtype != torch.float32:
        raise ValueError(f"sum_chunks: {chunks.dtype} into {out.dtype}; allowed: {_DTYPES} into fp32")
    if chunks.device != out.device:
        raise ValueError(f"sum_chunks: chunks on {chunks.device}, out on {out.device}")
    if not (chunks.is_contiguous() and out.is_contiguous()):
        raise ValueError("sum_chunks: chunks or out are not contiguous")
