"""Start a run: check the configuration, then torchrun. ``./run_train.sh`` ends here.

The configuration is checked before torch is imported, so a typo costs a fraction of a second. torchrun is
called as a library: its options are set from a few environment variables, its noise stays away, and the
exit code of the rank that failed first becomes ours.

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
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.packages import require_own_packages

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
        preflight(argv, world_size=count * nodes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    return _torchrun(argv, count, nodes, restarts)


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


def _torchrun(argv: Sequence[str], processes: int, nodes: int, restarts: int) -> int:
    """Run the workers under torchrun's elastic agent and translate how they ended."""
    env = os.environ
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # Idle OpenMP threads would spin; on a shared machine that slows a CPU run several times.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own progress lines
    env.setdefault("TOKENIZERS_PARALLELISM", "true")
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.CRITICAL)  # this process is only the agent: the workers speak for themselves
    try:
        run(parse_args([*_torchrun_options(env, processes, nodes, restarts), "-m", "trainer.train", *argv]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = " (often: the machine ran out of memory)" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{hint}", file=sys.stderr)
            return 128 - failure.exitcode
        return failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
