"""The devices that Octavo knows: peaks, measured ceilings, memory and links. One table for all who ask.

The step line divides by `peak_bf16` (mfu), `octavo plan` takes memory and ceilings, the benchmarks the
rest. A new device is one row. Patterns match whole words of the name that torch reports, so "H20" is not
found in "NVIDIA H200", nor "A6000" in "RTX 6000 Ada". A device that no row names has no peak: `mfu` is
then logged as n/a, and the user may set `metrics.peak_tflops`. It never gets the peak of a device that
merely looks alike. A slice of a device (MIG, vGPU) does not have the peak of the whole.

Peaks, bandwidths and links are the vendors' data sheets, without sparsity. A *ceiling* is what a large
GEMM or a copy reaches in practice: measured where `measured` is set, otherwise the data sheet times the
share that an H100 reaches of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Shares of its data sheet that an H100 SXM reaches: bf16 and float8 GEMMs of Llama 3 8B, a device copy.
_GEMM_BF16, _GEMM_FLOAT8, _COPY = 0.715, 0.64, 0.90
# The same for causal cuDNN attention (8192 positions, 128 wide heads), forward and backward.
ATTENTION_SHARE = (0.585, 0.485)
_LINK_SHARE = 0.60
"""Share of a link's data-sheet rate that large collectives reach."""


@dataclass(frozen=True)
class Device:
    """One row. Rates are per device; a link's rate is that of one direction."""

    key: str
    """What `octavo plan --device` takes."""
    pattern: str
    """Matches the name that torch reports."""
    memory_gib: float
    """What torch reports as total memory."""
    peak_bf16_tflops: float | None
    peak_float8_tflops: float | None
    memory_tb_per_second: float | None
    host_link_gb_per_second: float | None
    """To the other devices of its host (NVLink, Infinity Fabric, PCIe)."""
    network_gb_per_second: float | None = None
    """To devices of other hosts: one network port a device, as hosts of this kind usually have."""
    measured: tuple[float, float, float] | None = None
    """(bf16 GEMM TFLOP/s, float8 GEMM TFLOP/s, copy TB/s read and write) as measured, where they were."""
    measured_link_gb_per_second: float | None = None
    """Bus bandwidth of large all-gathers and reduce-scatters within a host, where it was measured."""
    devices_per_host: int = 8
    float8_rows: bool = True
    """Where it has float8 GEMMs, they also take a scale per row."""

    @property
    def gemm_bf16_tflops(self) -> float | None:
        """Ceiling of bf16 GEMMs."""
        return self.measured[0] if self.measured else _share(self.peak_bf16_tflops, _GEMM_BF16)

    @property
    def gemm_float8_tflops(self) -> float | None:
        """Ceiling of float8 GEMMs; None where the device has none."""
        return self.measured[1] if self.measured else _share(self.peak_float8_tflops, _GEMM_FLOAT8)

    @property
    def copy_tb_per_second(self) -> float | None:
        """Ceiling of memory traffic, read and write together."""
        return self.measured[2] if self.measured else _share(self.memory_tb_per_second, _COPY)

    @property
    def host_collective_gb_per_second(self) -> float | None:
        """Ceiling of a collective's bus bandwidth within a host."""
        return self.measured_link_gb_per_second or _share(self.host_link_gb_per_second, _LINK_SHARE)

    @property
    def network_collective_gb_per_second(self) -> float | None:
        """The same between hosts."""
        return _share(self.network_gb_per_second, 0.8)


def _share(value: float | None, share: float) -> float | None:
    return None if value is None else value * share


# The first row that matches wins.
DEVICES: tuple[Device, ...] = (
    # The 64GB variant of the A100 is a custom part with more multiprocessors.
    Device("a100", r"\bA100\b(?!.*\b64GB\b)(?=.*80GB)", 79.2, 312, None, 2.04, 300, 25),
    Device("a100_40gb", r"\bA100\b(?!.*\b64GB\b)", 39.5, 312, None, 1.56, 300, 25),
    Device("h100_nvl", r"\bH100 NVL\b", 93.1, 835, 1671, 3.9, 300, 50),
    Device("h100_pcie", r"\bH100 PCIe\b", 79.2, 756, 1513, 2.0, 64, 50),
    # SXM reports as "H100 80GB HBM3". The 64GB variant is a custom part.
    Device(
        "h100",
        r"\bH100\b.*\b(HBM3|SXM5?)\b",
        79.2,
        989,
        1979,
        3.35,
        450,
        50,
        measured=(708, 1268, 3.02),
    ),
    # The NVL variant of the H200 runs at lower clocks.
    Device(
        "h200",
        r"\bH200\b(?!.*\bNVL\b)",
        139.8,
        989,
        1979,
        4.8,
        450,
        50,
        measured=(690, 1233, 4.27),
        measured_link_gb_per_second=250,
    ),
    Device("h20", r"\bH20\b", 95.1, 148, 296, 4.0, 450, 50),
    Device("b200", r"\bB200\b", 178.4, 2250, 4500, 8.0, 900, 50),
    Device("gb200", r"\bGB200\b", 184.0, 2500, 5000, 8.0, 900, 50, devices_per_host=4),
    Device("l40s", r"\bL40S\b", 44.4, 362, 733, 0.86, 32, 25, float8_rows=False),
    Device("a6000", r"\bRTX A6000\b", 47.4, 154.85, None, 0.77, 32, 25),
    Device("mi300x", r"\bMI300X\b", 191.7, 1300, 2614, 5.3, 448, 50),
    Device("mi325x", r"\bMI325X\b", 255.7, 1300, 2614, 6.0, 448, 50),
    Device("mi355x", r"\bMI355X\b", 287.6, 2500, 5000, 8.0, 538, 50),
    # The host itself: no peak, hence no expected time; its memory is what the machine has.
    Device("cpu", r"\Acpu\Z", 0.0, None, None, None, None),
)

_SLICE = re.compile(r"\bMIG\b|\bGRID\b|-\d+(-\d+)?C\b", re.IGNORECASE)


def find_device(device_name: str) -> Device | None:
    """The row of a device by the name that `torch.cuda.get_device_name` reports; None where none fits."""
    if _SLICE.search(device_name):
        return None
    found = (row for row in DEVICES if re.search(row.pattern, device_name, re.IGNORECASE))
    return next(found, None)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of one device.

    Args:
        device_name: As `torch.cuda.get_device_name` reports it.

    Returns:
        The peak, or None for a device that the table does not know.
    """
    device = find_device(device_name)
    return None if device is None or device.peak_bf16_tflops is None else float(device.peak_bf16_tflops)
