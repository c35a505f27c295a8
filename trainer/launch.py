"""Start a run: check the configuration, then torchrun. ``./run_train.sh`` ends here.

The configuration is checked before torch is imported, so a typo costs a fraction of a second. torchrun is
called as a library: its options are set from a few environment variables, its noise stays away, and the
exit code of the rank that failed first becomes ours. SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on to
the workers, which save and end; nothing kills them meanwhile but a second signal.

    NGPU         processes on this machine (default: its GPUs, else 1)
    NNODES       machines (default 1)                 NODE_RANK      this machine's number
    MASTER_ADDR, MASTER_PORT, or RDZV_ENDPOINT        where machines meet
    RDZV_ID      name of the meeting (default octavo) MAX_RESTARTS   restarts after a failure (default 0)
    LOG_RANK     ranks whose output is shown (default 0); errors of the others are shown too
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from trainer.packages import require_own_packages
from trainer.resilience.crash_report import write_report
from trainer.resilience.exit_codes import exit_code_of
from trainer.resilience.notes import (
    NOTES_VARIABLE,
    STARTED_VARIABLE,
    clear,
    last_log_lines,
    read_notes,
    read_place,
)
from trainer.resilience.signals import signal_name

USAGE = (
    "usage: ./run_train.sh [--section.key VALUE ...]     (environment: NGPU, CONFIG_FILE, LOG_RANK, NNODES)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    require_own_packages()
    from trainer.commands.config import help_requested, print_help
    from trainer.config.errors import EXIT_BAD_INPUT, ConfigError
    from trainer.config.preflight import preflight

    if help_requested(argv):
        print_help(USAGE)
        return 0
    try:
        count, nodes = processes(os.environ), _number(os.environ, "NNODES", 1)
        restarts = _number(os.environ, "MAX_RESTARTS", 0, least=0)
        loaded = preflight(argv, world_size=count * nodes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    if loaded.config.comm.mode == "fake_backend":
        return _dry_run(argv, count * nodes)
    return _torchrun(argv, count, nodes, restarts, Path(loaded.config.job.dump_folder))


def _dry_run(argv: Sequence[str], world_size: int) -> int:
    """This process alone, as RANK (by default 0) of all."""
    os.environ.update(WORLD_SIZE=str(world_size), RANK=os.environ.get("RANK", "0"), LOCAL_RANK="0")
    from trainer.train import main as work

    return work(argv)


def visible_gpus(env: Mapping[str, str]) -> int:
    """GPUs that torch would see, counted without torch (CUDA and ROCm)."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in env:
            ids = [part.strip() for part in env[name].split(",")]
            valid = []
            for part in ids:
                if not part or part == "-1":
                    break  # CUDA stops at the first id that is none
                valid.append(part)
            return len(valid)
    nvidia = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    if nvidia:
        return len(nvidia)
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    return sum(1 for node in nodes if node.read_text().strip() not in ("", "0"))


def processes(env: Mapping[str, str]) -> int:
    """Processes on this machine: NGPU, else one a GPU, else one."""
    return _number(env, "NGPU", max(1, visible_gpus(env)))


def _number(env: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    from trainer.config.errors import ConfigError, Problem

    text = env.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError([Problem(name, f"got {text!r}; allowed: an integer >= {least}")])
    return int(text)


def _torchrun(argv: Sequence[str], processes: int, nodes: int, restarts: int, run_folder: Path) -> int:
    """Run the workers under torchrun's elastic agent and translate how they ended."""
    env = os.environ
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # Idle OpenMP threads would spin; on a shared machine that slows a CPU run several times.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own progress lines
    env.setdefault("TOKENIZERS_PARALLELISM", "true")
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from torch.distributed.run import config_from_args, parse_args

    from trainer.resilience.agent import run_agent

    logging.disable(logging.CRITICAL)  # this process is only the agent: the workers speak for themselves
    with tempfile.TemporaryDirectory(prefix="octavo-") as notes:
        options = [*_torchrun_options(env, processes, nodes, restarts), f"--log-dir={notes}"]
        config, entrypoint, arguments = config_from_args(parse_args([*options, "-m", "trainer.train", *argv]))
        env[NOTES_VARIABLE], env[STARTED_VARIABLE] = notes, str(time.time())
        report = partial(_report_failure, Path(notes), run_folder, argv)
        failure, requests = run_agent(config, str(entrypoint), arguments, report)
        if failure is not None:
            return exit_code_of(-requests[0] if requests and failure[1] < 0 else failure[1])
        codes = [note["exit_code"] for note in read_notes(Path(notes)).values() if note["kind"] == "stopped"]
    return codes[0] if codes else 0


def _report_failure(
    notes: Path, run_folder: Path, argv: Sequence[str], failure: tuple[int, int], restarts_left: int
) -> None:
    """Say which rank a signal ended, write the crash report, and clear the notes for another attempt."""
    rank, code = failure
    found = read_notes(notes)
    note = found.get(rank)
    if code < 0:
        hint = " (often: the machine ran out of memory)" if code == -signal.SIGKILL else ""
        what = f"rank {rank} was ended by {signal_name(-code)}{hint}"
        where = read_place(notes, rank)
        print(f"error: {what}; it was last at {where}", file=sys.stderr, flush=True)
        note = {"what": what, "exit_code": exit_code_of(code), "last_place": where, **(note or {})}
    if restarts_left > 0:
        print(f"restarting the workers; {restarts_left - 1} more restarts", file=sys.stderr, flush=True)
    if note is not None and "what" in note:
        others = {str(other): its.get("what", "") for other, its in found.items() if other != rank}
        lines = last_log_lines(notes, rank)
        write_report(
            run_folder, rank, note, argv=argv, log_lines=lines, others=others, restarts_left=restarts_left
        )
    clear(notes)


def _torchrun_options(env: Mapping[str, str], processes: int, nodes: int, restarts: int) -> list[str]:
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    if nodes == 1:
        return [*options, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    endpoint = (
        env.get("RDZV_ENDPOINT") or f"{env.get('MASTER_ADDR', 'localhost')}:{env.get('MASTER_PORT', '29500')}"
    )
    options += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    options += [f"--rdzv-id={env.get('RDZV_ID', 'octavo')}"]
    if "NODE_RANK" in env:
        options += [f"--node-rank={env['NODE_RANK']}"]
    return options


def _exit_now(code: int) -> None:
    """End without torch's own tidying up, which takes seconds on a busy machine; the workers are gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a reader such as `head` may have gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit_now(main())
