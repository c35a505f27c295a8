"""How much memory the run takes: of the GPU, or of the process where there is none.

On a CUDA device (ROCm too) the figures are the caching allocator's peaks since the last read: *active* is
what tensors held, *reserved* what the allocator took from the device. Reserved is what the step line shows,
for it decides whether the next allocation fits. Memory outside the allocator (the CUDA context, NCCL's
buffers) is in neither.

On a CPU both are the resident memory of this process at the time of the read, in percent of the machine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 1024**3


@dataclass(frozen=True)
class MemoryReading:
    """Peaks since the last read, per device; the two counts are since the start of the process."""

    active_gib: float
    active_percent: float
    reserved_gib: float
    reserved_percent: float
    alloc_retries: int
    """Times the allocator had to free its cache and try again. More than a few: memory is too tight."""
    ooms: int
    """Times it failed all the same."""


class MemoryMonitor:
    """Reads the memory of one device.

    Args:
        device: The device that the run trains on.
    """

    def __init__(self, device: torch.device | str) -> None:
        import torch

        self.device = torch.device(device)
        self._on_gpu = self.device.type == "cuda"
        if self._on_gpu:
            self.capacity_bytes = int(torch.cuda.get_device_properties(self.device).total_memory)
        else:
            import psutil

            self._process = psutil.Process()
            self.capacity_bytes = int(psutil.virtual_memory().total)
        self.reset()

    def reset(self) -> None:
        """Forget the peaks so far."""
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> MemoryReading:
        """Peaks since the last read, which start anew."""
        active, reserved, retries, ooms = self._read_gpu() if self._on_gpu else self._read_process()
        return MemoryReading(
            active_gib=active / GIB,
            active_percent=100 * active / self.capacity_bytes,
            reserved_gib=reserved / GIB,
            reserved_percent=100 * reserved / self.capacity_bytes,
            alloc_retries=retries,
            ooms=ooms,
        )

    def _read_gpu(self) -> tuple[int, int, int, int]:
        import torch

        from parallelisms.peer_memory import bytes_held

        stats, outside = torch.cuda.memory_stats(self.device), bytes_held()
        self.reset()
        # The keys are absent until the first allocation.
        return (
            stats.get("active_bytes.all.peak", 0) + outside,
            stats.get("reserved_bytes.all.peak", 0) + outside,
            stats.get("num_alloc_retries", 0),
            stats.get("num_ooms", 0),
        )

    def _read_process(self) -> tuple[int, int, int, int]:
        resident = self._process.memory_info().rss
        return resident, resident, 0, 0
