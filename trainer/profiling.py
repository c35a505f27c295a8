"""The profiler's traces, the CUDA allocator's snapshots, and what to say when memory runs out.

Both recorders are context managers around the training loop with a ``step()`` that the loop calls after
each optimizer step; switched off they do nothing. With period `profile_freq`::

    step      1 ... 6  7  8  9 | 10 | 11 ...        profile_freq 10, warm-up 3, active 1
    profiler  idle     warm-up   rec   idle         the trace is written after step 10

    {dump_folder}/profile_traces/iteration_10/rank0_trace.json               https://ui.perfetto.dev
    {dump_folder}/memory_snapshot/iteration_10/rank0_memory_snapshot.pickle  https://pytorch.org/memory_viz

The profiler slows the steps that it is active in, and writing takes time: keep ``step()`` outside tps.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainer.metrics.config import ProfilingConfig

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Allocations and frees that a snapshot goes back; about 100 MB of pickle.
_SNAPSHOT_EVENTS = 100_000


class TraceRecorder:
    """Records steps with torch.profiler and writes a Chrome trace a period.

    Args:
        config: The ``[profiling]`` section.
        dump_folder: Root of the run's outputs.
        rank: Global rank, for the file's name.
        first_step: The step that the loop runs first; after a resume not 1. A period counts from there.
        last_step: The step that the loop runs last, to warn where no trace would come of it.
    """

    def __init__(
        self,
        config: ProfilingConfig,
        dump_folder: Path,
        *,
        rank: int = 0,
        first_step: int = 1,
        last_step: int | None = None,
    ) -> None:
        self._config = config
        self._folder = Path(dump_folder) / config.save_traces_folder
        self._rank = rank
        self._step = first_step - 1
        self._profiler: Any = None
        first_trace = self._step + config.profile_freq
        if config.enable_profiling and last_step is not None and last_step < first_trace:
            logger.warning(
                "profiling: the run ends at step %d, before its first trace at step %d; "
                "lower profiling.profile_freq",
                last_step,
                first_trace,
            )

    def __enter__(self) -> TraceRecorder:
        """Start the schedule."""
        if not self._config.enable_profiling:
            return self
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        # Said once per process of every scheduled profile, and what is wanted here.
        warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
        config = self._config
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(
                wait=config.profile_freq - config.profiler_warmup - config.profiler_active,
                warmup=config.profiler_warmup,
                active=config.profiler_active,
            ),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )
        self._profiler.__enter__()
        logger.info("profiling: a trace every %d steps to %s", config.profile_freq, self._folder)
        return self

    def step(self) -> None:
        """Tell that an optimizer step is over; writes the trace where a period ends."""
        self._step += 1
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop; a period that was not finished gives no trace."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.on_trace_ready = None
        profiler.__exit__(exc_type, exc, traceback)

    def _write_trace(self, profiler: Any) -> None:
        folder = self._folder / f"iteration_{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{self._rank}_trace.json"
        profiler.export_chrome_trace(str(path))
        logger.info("profiling: wrote %s", path)


class MemorySnapshotRecorder:
    """Records the CUDA allocator's history and writes it a period, and when memory runs out.

    Args:
        config: The ``[profiling]`` section.
        dump_folder: Root of the run's outputs.
        device: The device that the run trains on. On a CPU the setting has no effect, and says so.
        rank: Global rank, for the file's name.
        first_step: The step that the loop runs first.
    """

    def __init__(
        self,
        config: ProfilingConfig,
        dump_folder: Path,
        *,
        device: torch.device | str,
        rank: int = 0,
        first_step: int = 1,
    ) -> None:
        self._folder = Path(dump_folder) / config.save_memory_snapshot_folder
        self._period = config.profile_freq
        self._rank = rank
        self._first_step = first_step
        self._step = first_step - 1
        self._enabled = config.enable_memory_snapshot
        device_type = str(device).partition(":")[0]
        if self._enabled and device_type != "cuda":
            logger.warning("profiling.enable_memory_snapshot has no effect on %s", device_type)
            self._enabled = False

    def __enter__(self) -> MemorySnapshotRecorder:
        """Start the history."""
        if self._enabled:
            import torch

            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_EVENTS)
            logger.info("memory snapshot: one every %d steps to %s", self._period, self._folder)
        return self

    def step(self) -> None:
        """Tell that an optimizer step is over; writes the snapshot where a period ends."""
        self._step += 1
        if self._enabled and (self._step - self._first_step + 1) % self._period == 0:
            self._write(f"iteration_{self._step}")

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the history; out of memory, write it first (the step that failed, with ``_exit``)."""
        if not self._enabled:
            return
        import torch

        if isinstance(exc, torch.OutOfMemoryError):
            try:
                self._write(f"iteration_{self._step + 1}_exit")
            except Exception as error:  # a full disk, say: `exc` is what the run ends with
                logger.warning("memory snapshot: not written: %s", error)
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str) -> None:
        import torch

        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{self._rank}_memory_snapshot.pickle"
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
        logger.info("memory snapshot: wrote %s", path)


def resident_bytes(
    parameters: Iterable[torch.Tensor], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> dict[str, int]:
    """Bytes on this device of parameters, their gradients and the optimizer's state.

    The optimizers' own parameters count too: in forward and backward the modules may hold copies of them.
    Sharded tensors count with their local part, wrappers with what they wrap, and a storage that several
    tensors share counts once.
    """
    optimizers = list(optimizers)
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    params = [*parameters, *(p for group in groups for p in group)]
    states = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "untyped_storage")
    ]
    return {
        "parameters": _storage_bytes(params),
        "gradients": _storage_bytes([p.grad for p in params if p.grad is not None]),
        "optimizer state": _storage_bytes(states),
    }


def _storage_bytes(tensors: Iterable[Any]) -> int:
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for part in _parts_with_storage(tensor):
            if part.device.type != "meta":
                storage = part.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _parts_with_storage(tensor: Any) -> Iterator[Any]:
    """What a DTensor or another wrapper is made of, down to tensors with memory of their own."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, torch.Tensor):  # since torch 2.13 a DTensor names its mesh as well
            yield from _parts_with_storage(part)


def explain_out_of_memory(
    exc: BaseException,
    device: torch.device | str,
    parameters: Iterable[torch.Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    settings: Mapping[str, Any],
) -> str:
    """`oom_message` with the bytes of these parameters and optimizers.

    It never fails: what cannot be counted is left out, with a warning.
    """
    resident = _if_it_can_be_had(lambda: resident_bytes(parameters, optimizers))
    return oom_message(exc, device=device, resident=resident, settings=settings)


def _if_it_can_be_had(figures: Callable[[], dict[str, int]]) -> dict[str, int]:
    """A report that fails would stand in place of the error it is about."""
    try:
        return figures()
    except Exception as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        logger.warning("out of memory, and the report on it is incomplete: %s", what)
        return {}


def oom_message(
    exc: BaseException,
    *,
    device: torch.device | str | None = None,
    resident: Mapping[str, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """A short message for a device that ran out of memory: what was resident, and what lowers it.

    Args:
        exc: The error; its first sentence is quoted.
        device: The device that ran out, for the allocator's figures.
        resident: Bytes by what holds them, as `resident_bytes` gives them.
        settings: Values by config key (``training.local_batch_size``) of the run. A setting that is
            as low as it goes is not suggested; one that is not given is, without its value.
    """
    lines = [_first_sentences(str(exc))]
    allocator = _if_it_can_be_had(lambda: _allocator_bytes(device))
    figures = [f"{name} {_gib(size)}" for name, size in allocator.items()]
    if resident:
        figures += [f"{name} {_gib(size)}" for name, size in resident.items()]
    if figures:
        lines.append(f"resident: {', '.join(figures)}")
    lines.append(f"to lower it: {'; '.join(_remedies(settings or {}))}")
    return "\n".join(lines)


def _first_sentences(text: str) -> str:
    # "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
    first = text.strip().partition("\n")[0] or "out of memory"
    return ". ".join(first.split(". ")[:2]).rstrip(".") + "."


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f}GiB"


def _allocator_bytes(device: torch.device | str | None) -> dict[str, int]:
    if device is None or not str(device).startswith("cuda"):
        return {}
    import torch

    from parallelisms.peer_memory import bytes_held

    outside = bytes_held()
    return {
        "allocated": torch.cuda.memory_allocated(device) + outside,
        "reserved": torch.cuda.memory_reserved(device) + outside,
        "capacity": int(torch.cuda.get_device_properties(device).total_memory),
    }


def _remedies(settings: Mapping[str, Any]) -> list[str]:
    """Settings that lower memory, the least costly first."""

    def named(key: str) -> str:
        return f"{key} (now {settings[key]})" if key in settings else key

    remedies = []
    mode = settings.get("activation_checkpoint.mode")
    if mode != "full":
        remedies.append(f'activation_checkpoint.mode = "full"{"" if mode is None else f" (now {mode})"}')
    if settings.get("training.local_batch_size") != 1:
        remedies.append(f"a smaller {named('training.local_batch_size')}")
    remedies.append(f"a shorter {named('training.seq_len')}")
    if not any("float8" in name for name in settings.get("model.converters", ())):
        remedies.append('model.converters = ["quantize.linear.float8"] with compile')
    remedies.append(f"more shards: more GPUs with {named('parallelism.data_parallel_shard_degree')}")
    return remedies
