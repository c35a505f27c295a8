"""Train a Llama 3 in bf16 and in float8, and compare: llama3.sh is its door.

    FLOAT8_RECIPE_WITH_BEST_SETTINGS   tensorwise (default), rowwise, rowwise_with_gw_hp
    NGPU               processes, one a GPU (default: all GPUs of this machine)
    FLAVOR, N_LAYERS   model (default 8B), and fewer layers than it has
    SEQ_LEN, LOCAL_BATCH_SIZE   8192, 1; data parallel over all processes
    ACCUMULATION       micro-batches a step (default 1)
    STEPS, WARMUP_STEPS   40, of which the first 10 are left out
    AC                 recompute: none, op (default), full, auto
    VARIANTS           of eager, bf16, tensorwise, tensorwise_bf16_gather, rowwise, rowwise_with_gw_hp; by
                       default bf16, which is the baseline of the speedups, and the recipe
    EXTRA_ARGS         flags for all of Octavo's runs; a flag given here counts over ours
    PEER=1             torchtitan + torchao beside it, the same variants; PEER_EXTRA_ARGS are flags for it
    TIMEOUT            seconds for one variant
    OUT                where runs, logs and results.md, .csv, .png go (outputs/benchmarks/llama3_FLAVOR)
    DRY_RUN=1          no training: the commands, and each layout built and stepped once without values

Tokens per second are per GPU, the median over the step lines after the warm-up; memory is the highest that
the allocator reserved, in GB (1e9 bytes). A variant that fails has a row that says so; the others run, and
the exit code is 1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.float8.training import peer
from benchmarks.float8.training.results import OCTAVO, PEER, Result, with_figures, write_results
from benchmarks.float8.training.settings import Settings, read_settings
from trainer.metrics.history import read_history

_GRACE_SECONDS = 20


def main() -> int:
    """Run all variants; exit code 1 where one failed, 2 where the request cannot be met."""
    if sys.argv[1:]:
        print(__doc__.strip())
        return 0 if {"-h", "--help"} & {*sys.argv[1:]} else 2
    try:
        settings = read_settings(os.environ, ROOT)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    settings.out.mkdir(parents=True, exist_ok=True)
    shape = f"seq {settings.seq_len}, local batch {settings.local_batch_size} x {settings.accumulation}"
    print(
        f"{settings.model} on {settings.ngpu} processes, {shape}, AC {settings.ac}; results in {settings.out}"
    )
    results: list[Result] = []
    for variant in settings.variants:
        results.append(_train(settings, variant))
        _report(results[-1])
        if settings.peer:
            results.append(_train_peer(settings, variant))
            _report(results[-1])
        if not settings.dry_run:
            write_results(settings, results)  # each time: what is measured stays, whatever comes
    if not settings.dry_run:
        print("\n" + (settings.out / "results.md").read_text(), end="")
    return 1 if any(result.failure for result in results) else 0


def _report(result: Result) -> None:
    words = result.failure or result.note
    if result.median_tps is not None:
        words = f"{result.median_tps:,.0f} tokens/s per GPU"
    print(f"  {result.system}, {result.variant}: {words} ({result.seconds:.0f} s)", flush=True)


def _train(settings: Settings, variant: str) -> Result:
    words = [str(ROOT / "run_train.sh"), *settings.flags(variant)]
    shown = f"NGPU={settings.ngpu} " + shlex.join(words)
    print(f"\n{shown}", flush=True)
    log = settings.out / f"{variant}.log"
    began = time.monotonic()
    failure = _run(words, {"NGPU": str(settings.ngpu)}, ROOT, log, settings.timeout_seconds)
    seconds = time.monotonic() - began
    result = Result(OCTAVO, variant, shown, failure, seconds=seconds)
    if failure or settings.dry_run:
        return replace(result, note="the dry run took its step")
    try:
        rows = read_history(settings.out / variant).rows
    except ValueError as error:
        return Result(OCTAVO, variant, shown, f"no metrics: {error}", seconds=seconds)
    return with_figures(result, rows, settings.warmup_steps)


def _train_peer(settings: Settings, variant: str) -> Result:
    work = settings.out / f"peer_{variant}"
    config = work / "config.toml"
    words = peer.command(settings, config)
    extra = peer.environment(settings)
    shown = " ".join([*(f"{name}={value}" for name, value in extra.items()), shlex.join(words)])
    print(f"\n{shown}", flush=True)
    data, tokenizer = settings.out / "peer_data", ROOT / "tests" / "assets" / "tokenizer"
    work.mkdir(parents=True, exist_ok=True)
    config.write_text(peer.toml(settings, variant, data, tokenizer, work))
    if settings.dry_run:
        return Result(PEER, variant, shown, note=f"not run; its configuration is {config}")
    missing = [name for name in ("torchtitan", "torchao") if importlib.util.find_spec(name) is None]
    if missing:
        return Result(PEER, variant, shown, f"not installed: {' and '.join(missing)}")
    peer.write_data(data)
    log = settings.out / f"peer_{variant}.log"
    began = time.monotonic()
    failure = _run(words, extra, work, log, settings.timeout_seconds)
    result = Result(PEER, variant, shown, failure, seconds=time.monotonic() - began)
    return result if failure else with_figures(result, peer.read_log(log.read_text()), settings.warmup_steps)


def _run(words: list[str], extra: dict[str, str], folder: Path, log: Path, timeout: int | None) -> str:
    """Run to its end, its words into `log`; returns why it failed, or nothing."""
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, **extra},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"no end after {timeout} s; see {log.name}"
        finally:
            _end_group(process)
    return "" if code == 0 else f"exit code {code}: {_last_words(log)}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a variant may be left when the next one begins."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)


def _last_words(log: Path) -> str:
    """The first line that says ``error:``, else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:|\w*Error\b", line)]
    return (errors[0] if errors else lines[-1] if lines else "no output")[:160]


if __name__ == "__main__":
    sys.exit(main())
