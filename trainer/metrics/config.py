"""The ``[metrics]`` and ``[profiling]`` sections of the config. Read without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec


@dataclass(frozen=True)
class MetricsConfig:
    """What a run logs, how often and where to."""

    log_freq: int = field(default=10, metadata={"min": 1})
    """Log at step 1 and then every this many steps."""
    enable_tensorboard: bool = False
    """Write TensorBoard events. `metrics.jsonl` is written always."""
    disable_color_printing: bool = False
    """Print the step line without colours. They are used on a terminal only."""
    save_tb_folder: str = "tb"
    """Subfolder of `job.dump_folder` for TensorBoard events."""
    save_for_all_ranks: bool = False
    """Write one TensorBoard run per rank, `rank_N`, rather than one by the metrics rank alone."""
    enable_wandb: bool = False
    """Log to Weights & Biases as well (needs the extra `octavo[wandb]`). Project, team and run name come
    from the `WANDB_*` environment variables."""
    peak_tflops: float | None = field(default=None, metadata={"above": 0})
    """Dense bf16 peak of the device in TFLOP/s, the divisor of mfu, for a device that the table does not
    know. Unset, the device's name decides; an unknown name logs `mfu: n/a`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong with the section on this machine."""
        if self.enable_wandb and find_spec("wandb") is None:
            yield (
                "enable_wandb",
                "needs the package wandb, which is not installed: pip install 'octavo[wandb]'",
            )


@dataclass(frozen=True)
class ProfilingConfig:
    """Traces of the PyTorch profiler, and snapshots of the CUDA memory allocator."""

    enable_profiling: bool = False
    """Record steps with torch.profiler on a schedule and write Chrome traces (open them in Perfetto)."""
    save_traces_folder: str = "profile_traces"
    """Subfolder of `job.dump_folder` for the traces."""
    profile_freq: int = field(default=10, metadata={"min": 1})
    """Steps from one trace, or one memory snapshot, to the next."""
    profiler_active: int = field(default=1, metadata={"min": 1})
    """Recorded steps at the end of each period."""
    profiler_warmup: int = field(default=3, metadata={"min": 0})
    """Steps before the recorded ones in which the profiler runs and its result is thrown away."""
    enable_memory_snapshot: bool = False
    """Record the history of the CUDA allocator and write it as a pickle, every `profile_freq` steps and
    when memory runs out."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Subfolder of `job.dump_folder` for the memory snapshots."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        needed = self.profiler_warmup + self.profiler_active
        if self.enable_profiling and needed > self.profile_freq:
            yield (
                "profile_freq",
                f"{self.profile_freq} is shorter than warmup + active steps; allowed: >= {needed}",
            )
