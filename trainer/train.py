"""What every worker runs: load the configuration, train, and end with an exit code that means something.

The codes are listed in `trainer.resilience.exit_codes`. A worker of the launcher that stopped because it was
asked to ends with 0 and leaves the code in a note: to torchrun any other number is a failure, after which it
would start the workers again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.packages import require_own_packages
from trainer.resilience.exit_codes import EXIT_BAD_STEPS, EXIT_FAILED, EXIT_HUNG, EXIT_OUT_OF_MEMORY
from trainer.resilience.notes import keep_log, write_note
from trainer.resilience.signals import SignalWatch, die_with_parent

if TYPE_CHECKING:
    from trainer.trainer import Trainer

log = logging.getLogger(__name__)

_OTHERS_FIRST_SECONDS = 2.0
_LOST_RANK_SECONDS = 10.0
"""How long a rank whose peer has gone keeps its own error back."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    signals = SignalWatch(f"[rank {os.environ.get('RANK', 0)}] ").install()
    die_with_parent()
    faulthandler.enable()
    require_own_packages()
    from parallelisms.distributed import Rank
    from trainer.config.preflight import preflight
    from trainer.log import setup_logging

    rank = Rank.from_env()
    setup_logging(rank.rank, rank.world_size)
    keep_log(rank.rank)
    trainer: Trainer | None = None
    folder: Path | None = None
    try:
        from trainer.trainer import Trainer

        loaded = preflight(argv, rank.world_size)
        if loaded.config.comm.mode == "fake_backend":
            from trainer.dry_run import dry_run

            dry_run(loaded, rank)
            return 0
        folder = Path(loaded.config.job.dump_folder)
        trainer = Trainer(loaded, rank, signals)
        trainer.train()
        trainer.close()
    except Exception as error:
        return _failed(error, rank.rank, trainer, folder, argv)
    code = trainer.faults.exit_code
    return 0 if code and write_note(rank.rank, {"kind": "stopped", "exit_code": code}) else code


def _failed(
    error: Exception, rank: int, trainer: Trainer | None, folder: Path | None, argv: Sequence[str]
) -> int:
    """Say what went wrong, leave it for the crash report, and give the exit code."""
    import torch

    from trainer.checkpoint.files import EXIT_CHECKPOINT, CheckpointError
    from trainer.config.errors import EXIT_BAD_INPUT, ConfigError
    from trainer.profiling import oom_message
    from trainer.resilience.bad_steps import BadStepsError
    from trainer.resilience.crash_report import failure_note, leave_failure
    from trainer.trainer import DeviceMemoryError

    said_by_all: dict[type[Exception], int] = {
        ConfigError: EXIT_BAD_INPUT,
        CheckpointError: EXIT_CHECKPOINT,
        BadStepsError: EXIT_BAD_STEPS,
    }
    code = next((code for kind, code in said_by_all.items() if isinstance(error, kind)), EXIT_FAILED)
    what = str(error)
    if code != EXIT_FAILED:
        # This mostly meets every rank, and one message is enough: rank 0 speaks at once and its end stops
        # the others; a rank that is still here after a moment has met something of its own.
        if rank != 0:
            time.sleep(_OTHERS_FIRST_SECONDS)
        print(error if isinstance(error, ConfigError) else f"error: {error}", file=sys.stderr)
    elif isinstance(error, (DeviceMemoryError, torch.OutOfMemoryError)):
        code = EXIT_OUT_OF_MEMORY
        if not isinstance(error, DeviceMemoryError):  # met where nobody explains it: when restoring, say
            what = oom_message(error, device="cuda" if torch.cuda.is_initialized() else None)
        log.error("%s", what)
    else:
        code, what = _unexpected(error, rank, trainer)
    if not isinstance(error, ConfigError):
        step, phase = trainer.faults.where if trainer is not None else (None, "start")
        leave_failure(rank, folder, argv, failure_note(error, what, code=code, step=step, phase=phase))
    return code


def _unexpected(error: Exception, rank: int, trainer: Trainer | None) -> tuple[int, str]:
    """Print a traceback; where the error is that another rank is missing, that rank first."""
    import traceback

    from parallelisms.distributed import is_lost_connection

    details = traceback.format_exc()
    if is_lost_connection(error):
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        if not late:
            # A rank that failed ends the others' calls. It speaks for itself, and its end stops this one.
            time.sleep(_LOST_RANK_SECONDS)
        watchdog = trainer.faults.watchdog if trainer is not None else None
        verdict = watchdog.verdict(only_silent=not late) if watchdog is not None else None
        if verdict is not None:
            print(f"error: a rank hangs\n  {verdict}", file=sys.stderr)
            return EXIT_HUNG, f"a rank hangs: {verdict}"
    print(f"error: rank {rank} failed\n{details}", file=sys.stderr)
    return EXIT_FAILED, f"{type(error).__name__}: {error}".partition("\n")[0]


def exit_now(code: int) -> None:
    """End the process without waiting for threads or collectives of ranks that go on."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a reader such as `head` may have gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_now(main())
