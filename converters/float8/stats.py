"""Float8 health of one cast: four numbers that say whether the format still holds the tensor.

    amax        max |x|
    saturated   share of elements with |x| * s beyond fmax (clipped; never with a dynamic scale)
    flushed     share of nonzero elements that became zero (too small for the format)
    sqnr_db     10 log10( sum x^2 / sum (x - x8 / s)^2 ), at most 120

They cost a few passes over the tensor and run only on logged steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from converters.float8.fsdp import weight_before_gather
from converters.float8.scaling import cast_to_float8, compute_amax, dequantize, float8_max

FIELDS = ("amax", "saturated_share", "flushed_share", "sqnr_db")
TENSORS = ("input", "weight", "grad_output")
_ROUNDING_SLACK = 1 + 1e-6
"""amax * s may exceed fmax by a rounding error, which loses nothing."""


def health(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(4,) fp32: the numbers of FIELDS for x cast with `scale`."""
    wide = x.to(torch.float32)
    x8 = cast_to_float8(wide, scale, dtype)
    saturated = ((wide * scale).abs() > float8_max(dtype) * _ROUNDING_SLACK).to(torch.float32).mean()
    flushed = ((x8.to(torch.float32) == 0) & (wide != 0)).to(torch.float32).mean()
    # The scale brings sums of squares of tiny gradients into fp32's range; it cancels in the ratio.
    unit = torch.clamp(compute_amax(wide), min=torch.finfo(torch.float32).tiny)
    signal = (wide / unit).square().sum()
    noise = ((wide - dequantize(x8, scale)) / unit).square().sum()
    sqnr = 10 * torch.log10(signal / torch.clamp(noise, min=1e-12 * signal))
    return torch.stack([compute_amax(x).to(torch.float32), saturated, flushed, sqnr])


def register_stats(module: nn.Module, device: torch.device) -> None:
    """Give a Float8Linear its slots; they are written when `module.collect_stats` is on."""
    for tensor in TENSORS:
        module.register_buffer(
            f"float8_stats_{tensor}", torch.zeros(len(FIELDS), device=device), persistent=False
        )


def record_gathered_weight(layer: nn.Module) -> None:
    """The weight's numbers where FSDP2 gathers it in float8, so that no forward sees its high precision.

    They are those of this rank's shard; every rank of the weight's mesh must take part.
    """
    found = weight_before_gather(layer.weight)  # type: ignore[arg-type]
    if found is not None and found[0].numel():
        layer.float8_stats_weight.copy_(health(*found))  # type: ignore[operator, union-attr]


def collect(layers: dict[str, nn.Module], stages: dist.ProcessGroup | None = None) -> dict[str, float]:
    """All layers' numbers as tag -> value, and the worst of each kind over the layers.

    Args:
        layers: Float8 layers of this rank, by FQN.
        stages: Ranks that hold the other layers of the model; None where this one holds all.
    """
    table = _table(layers)
    if stages is not None:
        tables: list[Any] = [None] * dist.get_world_size(stages)
        dist.all_gather_object(tables, table, group=stages)
        table = {fqn: rows for each in tables for fqn, rows in each.items()}
    tags: dict[str, float] = {}
    for fqn, rows in table.items():
        for tensor, row in zip(TENSORS, rows, strict=True):
            if row[0] > 0:  # a tensor of zeros, or one that no GEMM cast, has nothing to say
                tags.update({f"float8/{fqn}/{tensor}/{name}": v for name, v in zip(FIELDS, row, strict=True)})
    for tensor in TENSORS:
        for name, worst in (("saturated_share", max), ("flushed_share", max), ("sqnr_db", min)):
            values = [v for tag, v in tags.items() if tag.endswith(f"/{tensor}/{name}")]
            if values:
                tags[f"float8/worst/{tensor}/{name}"] = worst(values)
    return tags


def _table(layers: dict[str, nn.Module]) -> dict[str, list[list[float]]]:
    """FQN -> the FIELDS of each of TENSORS."""
    if not layers:
        return {}
    slots = [getattr(layer, f"float8_stats_{tensor}") for layer in layers.values() for tensor in TENSORS]
    rows = torch.stack(slots).reshape(len(layers), len(TENSORS), len(FIELDS)).tolist()  # one transfer
    return dict(zip(layers, rows, strict=True))
