"""What tests of the cast kernels share: samples, comparisons, and the kernels' form for Hopper.

The interpreter's own conversion to float8 is wrong (it truncates and loses NaN), so kernels write fp32 in
these tests; `tests/gpu/test_float8_kernels_gpu.py` compares float8 elements with the reference, bit for bit.
"""

import math

import torch

from kernels.scaling import float8_max
from tests.kernels.hopper import compile_for_hopper

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SIZES = [(1, 1), (3, 130), (130, 3), (257, 80)]
VECTOR_LOAD, VECTOR_STORE = "ld.global.v4.b32", "st.global.v4.b32"


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) * 3).to(dtype)


def rounded_away(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is rounded to float8: the clamped product."""
    return torch.clamp(x.float() * scale, -float8_max(dtype), float8_max(dtype))


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    without_nan = (t.nan_to_num(123.0, math.inf, -math.inf) for t in (got, want))
    return got.shape == want.shape and torch.equal(*without_nan)


def all_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return all(same(*pair) for pair in zip(got, want, strict=True))


def compiled(
    kernel: str, pointers: dict[str, str], sizes: str, constants: dict[str, object], warps: int
) -> dict[str, object]:
    """`kernel` for Hopper, with all that can be a multiple of 16."""
    names = sizes.split()
    signature = {**pointers, **dict.fromkeys(names, "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = [name for name in (*pointers, *names) if name != "rounds"]
    return compile_for_hopper(
        f"kernels.triton.{kernel}", signature, constants, num_warps=warps, aligned=tuple(aligned)
    )
