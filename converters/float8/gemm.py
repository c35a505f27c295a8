"""One scaled GEMM: float8 operands in, a high-precision product out.

    out (P, R) = (a8 (P, Q) @ b8 (Q, R)) * (1 / s_a) * (1 / s_b)      accumulated in fp32

s_a is a scalar or (P, 1), s_b a scalar or (1, R): a scale may vary along what survives, never along
the contraction Q. Where one side has a scale per row, the other's scalar is repeated.

Layouts: Hopper's float8 tensor cores read both operands contraction-contiguous, so a is row-major
and b column-major (bᵀ row-major). An operand that is not gets copied. Q and R must be divisible by
16; what is not is padded with zeros, which add nothing to a sum, and cut off again.

Back ends, never silently exchanged:

- ``torch._scaled_mm`` on CUDA (SM 8.9 for scalar scales, SM 9.0 for rows), ROCm and CPU (row scales from
  torch 2.13 on; before that, row-scaled products on a CPU are emulated and the report says so). All three
  take e4m3 x e4m3, e5m2 x e4m3 and e4m3 x e5m2 with bf16, fp16 and fp32 outputs (seen on an H100 with
  torch 2.11 and on a CPU with torch 2.13); on a CPU fast accumulation means nothing.
- ``emulate``: operands dequantised to fp32, one fp32 product. Equal to the above but for the order
  of accumulation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from converters.float8.scaling import dequantize, inverse_scale
from kernels.cast import transpose_float8

ALIGNMENT = 16
"""Float8 GEMMs need the contraction and the number of columns divisible by this."""


CPU_HAS_ROW_SCALES = torch.__version__ >= "2.13"
"""Whether the CPU's `torch._scaled_mm` takes a scale per row (2.11 does not; 2.13 does)."""


class Float8Operand(NamedTuple):
    """A float8 matrix and what its elements were multiplied by."""

    data: Tensor
    scale: Tensor
    """fp32, broadcastable to `data`."""
    inverse: Tensor | None = None
    """fp32(1 / scale), where the cast has given it."""

    def t(self) -> Float8Operand:
        """The transpose, without a copy."""
        inverse = None if self.inverse is None else _turned(self.inverse)
        return Float8Operand(self.data.t(), _turned(self.scale), inverse)


def _turned(scale: Tensor) -> Tensor:
    # A view and not t(): of (1, R) that has strides (1, R), for which torch._scaled_mm wants (1, 1).
    return scale.view(scale.shape[1], scale.shape[0]) if scale.dim() == 2 else scale


@functools.lru_cache(maxsize=16)
def unsupported_reason(device_type: str, index: int | None, axiswise: bool) -> str | None:
    """Why that device has no float8 GEMM of that kind, or None where it has."""
    if device_type in ("cpu", "meta"):
        return None
    if device_type != "cuda":
        return f"float8 GEMMs are not available on {device_type!r}"
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName
        return (
            None
            if arch.startswith(("gfx94", "gfx95"))
            else f"float8 GEMMs need AMD gfx94x or later, this is {arch}"
        )
    capability = torch.cuda.get_device_capability(index)
    needed = (9, 0) if axiswise else (8, 9)
    if capability >= needed:
        return None
    recipe = "rowwise" if axiswise else "tensorwise"
    name = torch.cuda.get_device_name(index)
    have = f"{capability[0]}.{capability[1]}"
    return f"float8 {recipe} GEMMs need compute capability {needed[0]}.{needed[1]}, {name} has {have}"


def check_device(device_type: str, index: int | None, *, axiswise: bool, emulate: bool) -> None:
    """Raise ValueError, naming the way out, where the device cannot run what is asked."""
    reason = None if emulate else unsupported_reason(device_type, index, axiswise)
    if reason is not None:
        raise ValueError(f"{reason}.\nSet emulate = true to run the same numerics in high precision (slow)")


def high_precision_mm(a: Tensor, b: Tensor) -> Tensor:
    """A @ b in the operands' own dtype: autocast must not reach into a GEMM whose dtype is decided."""
    with torch.autocast(device_type=a.device.type, enabled=False):
        return torch.mm(a, b)


def _row_major(x: Tensor) -> Tensor:
    """`x`, copied where it is not contiguous."""
    if x.is_contiguous():
        return x
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        # For CPUs inductor (torch 2.13) fuses a transposed float8 store with the amax of another tensor
        # into a kernel that gives NaN (tests/converters/test_compile.py). An opaque op is not fused.
        return transpose_float8(x.t())
    return x.contiguous()


def scaled_mm(
    a: Float8Operand, b: Float8Operand, *, out_dtype: torch.dtype, use_fast_accum: bool, emulate: bool
) -> Tensor:
    """The product of two float8 matrices, in `out_dtype`.

    Args:
        a: (P, Q), scale a scalar or (P, 1).
        b: (Q, R), scale a scalar or (1, R).
        out_dtype: dtype of the product; sums are kept in fp32 until then.
        use_fast_accum: see `Float8GemmConfig`.
        emulate: dequantise and multiply in fp32.
    """
    row_scaled = a.scale.dim() == 2 or b.scale.dim() == 2
    if emulate or (row_scaled and a.data.device.type == "cpu" and not CPU_HAS_ROW_SCALES):
        product = high_precision_mm(dequantize(a.data, a.scale), dequantize(b.data, b.scale))
        return product.to(out_dtype)
    (rows, inner), columns = a.data.shape, b.data.shape[1]
    if rows == 0 or inner == 0 or columns == 0:
        return a.data.new_zeros((rows, columns), dtype=out_dtype)
    scale_a, scale_b = _gemm_scales(a, b)
    pad_inner, pad_columns = -inner % ALIGNMENT, -columns % ALIGNMENT
    a_data, b_data = _pad(a.data, 0, pad_inner), _pad(b.data, pad_inner, pad_columns)
    if pad_columns and scale_b.dim() == 2:
        scale_b = F.pad(scale_b, (0, pad_columns), value=1.0)
    # _scaled_mm reads a row-major and b column-major: both contiguous along the contraction.
    a_data, b_data = _row_major(a_data), _row_major(b_data.t()).t()
    # The CPU's _scaled_mm is made of matmuls that autocast would lower to bf16.
    with torch.autocast(device_type=a_data.device.type, enabled=False):
        out = torch._scaled_mm(
            a_data,
            b_data,
            scale_a=scale_a,
            scale_b=scale_b,
            out_dtype=out_dtype,
            use_fast_accum=use_fast_accum,
        )
    return out[:, :columns].contiguous() if pad_columns else out


def _gemm_scales(a: Float8Operand, b: Float8Operand) -> tuple[Tensor, Tensor]:
    inverse_a, inverse_b = (
        inverse_scale(one.scale) if one.inverse is None else one.inverse for one in (a, b)
    )
    if inverse_a.dim() == 0 and inverse_b.dim() == 0:
        return inverse_a, inverse_b
    rows, columns = a.data.shape[0], b.data.shape[1]
    return inverse_a.expand(rows, 1).contiguous(), inverse_b.expand(1, columns).contiguous()


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    if rows == 0 and columns == 0:
        return x
    # Zero bytes are float8 zeros, and every back end can pad bytes.
    return F.pad(x.view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)
