"""Which device is measured, which is modelled, and with what ceilings."""

from __future__ import annotations

import torch

from converters.float8.cost import Ceilings
from trainer.config.errors import unknown
from trainer.metrics.devices import DEVICES, Device, find_device


def measured_device(kind: str) -> torch.device:
    """The device to time on: ``cuda`` is this machine's first GPU.

    Raises:
        ValueError: there is none.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "this machine has no GPU that torch can use; --device cpu runs on the CPU, for debugging"
        )
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """As torch names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def present_row() -> Device | None:
    """The table's row of this machine's GPU; None without a GPU, or with one that the table does not know."""
    return find_device(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def named_row(key: str) -> Device:
    """The row of that name.

    Raises:
        ValueError: there is none, with the nearest.
    """
    rows = {device.key: device for device in DEVICES if device.gemm_bf16_tflops is not None}
    if key not in rows:
        raise ValueError(
            f"--device: {unknown('device', key, rows, list_all=False)} (known: {', '.join(rows)})"
        )
    return rows[key]


def ceilings_of(row: Device) -> Ceilings:
    """The table's ceilings; a device without float8 GEMMs has a float8 rate of 0."""
    assert row.gemm_bf16_tflops is not None
    assert row.copy_tb_per_second is not None
    return Ceilings(
        row.gemm_bf16_tflops * 1e12, (row.gemm_float8_tflops or 0.0) * 1e12, row.copy_tb_per_second * 1e12
    )
