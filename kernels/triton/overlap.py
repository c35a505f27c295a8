"""Kernels that begin while the one before them ends (programmatic dependent launch, Hopper and later).

Between two kernels of a stream a GPU stands still for a microsecond: the first one's last programs end, and
only then is the second launched. A kernel launched with `overlapping` is launched earlier, as soon as every
program of the one before has begun and called `after_former`, or has ended. Its programs fill the places that
become free and stop in `after_former` until the one before has ended and memory holds what it wrote. What
they do until then must not depend on it, nor write: memory may be in use yet by kernels before.

`after_former` waits first and lets the next kernel begin after that. So whoever is launched early knows that
everything before its predecessor has ended: in a pair of ours, launched one behind the other, the second may
read what the first was given before it waits for what the first made
(`kernels.triton.cast.scale_and_cast_tiles_kernel`).

Measured on an H100, amax and both casts behind it, with the second loading its tiles before it waits: 68.2 to
65.5 us for (8192, 4096) bf16, 35.5 to 33.2 for (4096, 4096).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

APART = {"OVERLAPS": False}
"""How to launch a kernel that calls `after_former` where it has to wait for all of the one before."""


@triton.jit
def after_former(OVERLAPS: tl.constexpr):
    """Wait for the kernel before, if this one may have begun before its end; let the next one begin."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlapping(x: Tensor) -> dict[str, bool]:
    """How to launch a kernel that calls `after_former`, on x's device."""
    able = x.device.type == "cuda" and _begins_early(x.device.index)
    return {"OVERLAPS": True, "launch_pdl": True} if able else APART


@functools.cache
def _begins_early(index: int | None) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)
