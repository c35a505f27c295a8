"""Outcomes of a comparison's variants, and the table that is published."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.float8.pictures import bars, can_draw
from benchmarks.float8.tables import Table, host_lines
from benchmarks.float8.training.settings import BASELINE, VARIANTS, Settings
from trainer.launch import visible_gpus

OCTAVO, PEER = "Octavo", "torchtitan + torchao"
_GB = 2**30 / 1e9
CSV_HEADER = [
    *("model", "system", "variant", "scaling", "gpus", "seq_len", "local_batch_size", "accumulation", "ac"),
    *("status", "median_tps", "peak_memory_gb", "peak_memory_gib", "speedup"),
    *("steps_measured", "last_loss", "seconds", "command"),
]


@dataclass(frozen=True)
class Result:
    """One variant's outcome."""

    system: str
    variant: str
    command: str
    failure: str = ""
    """Why there are no figures; empty where there are."""
    note: str = ""
    """What there is to say without figures: of a dry run."""
    median_tps: float | None = None
    """Per GPU."""
    peak_gib: float | None = None
    last_loss: float | None = None
    steps_measured: int = 0
    """Step lines that the median is of."""
    seconds: float = 0.0
    """From start to end, compile included."""

    @property
    def scaling(self) -> str:
        """What the table calls it."""
        return VARIANTS[self.variant].scaling + (f", {PEER}" if self.system == PEER else "")


def with_figures(result: Result, rows: Sequence[Mapping[str, float]], warmup_steps: int) -> Result:
    """Median throughput after the warm-up, and the peak of memory over all step lines."""
    steady = [row for row in rows if row["step"] > warmup_steps and row.get("tps") is not None]
    if not steady:
        missing = f"no step line after step {warmup_steps}"
        return replace(result, failure=missing)
    return replace(
        result,
        median_tps=statistics.median(float(row["tps"]) for row in steady),
        peak_gib=max(float(row["memory_gib"]) for row in rows),
        last_loss=float(rows[-1]["loss"]),
        steps_measured=len(steady),
    )


def table_of(settings: Settings, results: Sequence[Result]) -> Table:
    """The comparison as it is published."""
    table = Table(
        ("Model", "Scaling", "Peak Memory (GB)", "Median tokens/second", "Speedup over baseline"),
        right=(2, 3, 4),
    )
    base = _baseline(results)
    for result in results:
        if result.median_tps is None or result.peak_gib is None:
            table.rows.append((settings.model, result.scaling, "", f"failed: {result.failure}", ""))
            continue
        speedup = "" if base is None else f"{result.median_tps / base:.2f}x"
        memory = f"{result.peak_gib * _GB:.2f}"
        table.rows.append((settings.model, result.scaling, memory, f"{result.median_tps:,.0f}", speedup))
    return table


def _baseline(results: Sequence[Result]) -> float | None:
    """Octavo's compiled bf16; None where it was not run, or failed."""
    found = [r.median_tps for r in results if (r.system, r.variant) == (OCTAVO, BASELINE)]
    return found[0] if found else None


def against_peer(results: Sequence[Result]) -> list[str]:
    """Octavo over the peer, for each variant that both ran."""
    tps = {(result.system, result.variant): result.median_tps for result in results}
    lines = []
    for variant in dict.fromkeys(result.variant for result in results):
        mine, its = tps.get((OCTAVO, variant)), tps.get((PEER, variant))
        if mine is not None and its is not None:
            lines.append(f"- {VARIANTS[variant].scaling}: {mine / its:.3f}x the tokens/s of {PEER}")
    return lines


def write_results(settings: Settings, results: Sequence[Result]) -> None:
    """results.md, .csv and .png."""
    gpu = _gpu_name()
    (settings.out / "results.md").write_text(_markdown(settings, results, gpu))
    Table(CSV_HEADER, _csv_rows(settings, results)).write_csv(settings.out / "results.csv")
    series: dict[str, list[tuple[str, float]]] = {}
    for result in results:
        if result.median_tps is not None:
            point = (VARIANTS[result.variant].scaling, result.median_tps)
            series.setdefault(result.system, []).append(point)
    if series and can_draw():
        title = f"{settings.model}, {settings.ngpu} x {gpu}: tokens per second and GPU"
        bars(title, series, "median tokens per second and GPU", settings.out / "results.png")


def _markdown(settings: Settings, results: Sequence[Result], gpu: str) -> str:
    head = host_lines(f"{settings.ngpu} x {gpu}")
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.given.items())
    head[-1] = f"command: {given} ./benchmarks/float8/training/llama3.sh"
    sizes = (
        f"sequences of {settings.seq_len} tokens, local batch {settings.local_batch_size}, "
        f"micro-batches a step: {settings.accumulation}, AC {settings.ac}; {settings.steps} steps, of which "
        f"the first {settings.warmup_steps} are left out"
    )
    parts = ["  \n".join([*head, sizes]), table_of(settings, results).markdown()]
    parts += ["\n".join(lines)] if (lines := against_peer(results)) else []
    return "\n\n".join([*parts, "\n".join(f"    {result.command}" for result in results)]) + "\n"


def _csv_rows(settings: Settings, results: Sequence[Result]) -> list[Sequence[str]]:
    base = _baseline(results)
    rows: list[Sequence[str]] = []
    for r in results:
        figures = [""] * 4
        if r.median_tps is not None and r.peak_gib is not None:
            speedup = "" if base is None else f"{r.median_tps / base:.4f}"
            figures = [f"{r.median_tps:.1f}", f"{r.peak_gib * _GB:.3f}", f"{r.peak_gib:.3f}", speedup]
        what = [settings.model, r.system, r.variant, r.scaling]
        run = [settings.ngpu, settings.seq_len, settings.local_batch_size, settings.accumulation, settings.ac]
        loss = "" if r.last_loss is None else str(r.last_loss)
        tail = [str(r.steps_measured), loss, f"{r.seconds:.1f}", r.command]
        rows.append([*what, *map(str, run), r.failure or "ok", *figures, *tail])
    return rows


def _gpu_name() -> str:
    if visible_gpus(os.environ) == 0:
        return "cpu"
    # Asked of the driver: this process must not hold a GPU that the runs need.
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    return lines[0].strip() if lines else "GPU (name unknown)"
