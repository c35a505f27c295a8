"""Dense bf16 peak of a device by the name that torch reports for it.

A new device is one row. Patterns match whole words, so "H20" is not found in "NVIDIA H200", nor "A6000"
in "RTX 6000 Ada". A device that no row names has no peak: `mfu` is then logged as n/a, and the user may
set `metrics.peak_tflops`. It never gets the peak of a device that merely looks alike. A slice of a device
(MIG, vGPU) does not have the peak of the whole.

Sources: the vendors' data sheets, figures without sparsity.
"""

from __future__ import annotations

import re

# Pattern of the device name -> dense bf16 peak in TFLOP/s. The first row that matches wins.
DEVICE_PEAKS: dict[str, float] = {
    # The 64GB variant is a custom part with more multiprocessors.
    r"\bA100\b(?!.*\b64GB\b)": 312,
    r"\bH100 NVL\b": 835,
    r"\bH100 PCIe\b": 756,
    # SXM reports as "H100 80GB HBM3". The 64GB variant is a custom part.
    r"\bH100\b.*\b(HBM3|SXM5?)\b": 989,
    # The NVL variant runs at lower clocks.
    r"\bH200\b(?!.*\bNVL\b)": 989,
    r"\bH20\b": 148,
    r"\bB200\b": 2250,
    r"\bGB200\b": 2500,
    r"\bL40S\b": 362,
    r"\bRTX A6000\b": 154.85,
    r"\bMI300X\b": 1300,
    r"\bMI325X\b": 1300,
    r"\bMI355X\b": 2500,
}

_SLICE = re.compile(r"\bMIG\b|\bGRID\b|-\d+(-\d+)?C\b", re.IGNORECASE)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of one device.

    Args:
        device_name: As `torch.cuda.get_device_name` reports it.

    Returns:
        The peak, or None for a device that the table does not know.
    """
    if _SLICE.search(device_name):
        return None
    for pattern, peak in DEVICE_PEAKS.items():
        if re.search(pattern, device_name, re.IGNORECASE):
            return float(peak)
    return None
