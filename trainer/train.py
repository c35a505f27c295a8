"""What every worker runs: load the configuration, train, and end with an exit code that means something.

0  trained to the end
1  failed: the traceback is on stderr, whatever LOG_RANK says
2  bad input (configuration, data, tokenizer): a message of a few lines
3  the device ran out of memory: what was resident and which settings lower it
4  a checkpoint that is needed cannot be used or written
130, 143  ended by Ctrl-C or SIGTERM
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from trainer.packages import require_own_packages

EXIT_FAILED = 1
EXIT_OUT_OF_MEMORY = 3
EXIT_INTERRUPTED = 130
LOST_RANK_SECONDS = 10
"""How long a rank whose peer has gone keeps its own error back."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    require_own_packages()
    from parallelisms.distributed import Rank, is_lost_connection
    from trainer.checkpoint.files import EXIT_CHECKPOINT, CheckpointError
    from trainer.config.errors import EXIT_BAD_INPUT, ConfigError
    from trainer.config.preflight import preflight
    from trainer.log import setup_logging
    from trainer.trainer import DeviceMemoryError, Trainer

    rank = Rank.from_env()
    setup_logging(rank.rank, rank.world_size)
    try:
        loaded = preflight(list(sys.argv[1:] if argv is None else argv), rank.world_size)
        if loaded.config.comm.mode == "fake_backend":
            from trainer.dry_run import dry_run

            dry_run(loaded, rank)
            return 0
        trainer = Trainer(loaded, rank)
        trainer.train()
        trainer.close()
    except (ConfigError, CheckpointError) as error:
        # Bad input mostly meets every rank, and one message is enough: rank 0 speaks at once and its end
        # stops the others; a rank that is still here after a moment has met something of its own.
        if rank.rank != 0:
            time.sleep(2)
        is_checkpoint = isinstance(error, CheckpointError)
        print(f"error: {error}" if is_checkpoint else error, file=sys.stderr)
        return EXIT_CHECKPOINT if is_checkpoint else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except DeviceMemoryError as error:
        log.error("%s", error)
        return EXIT_OUT_OF_MEMORY
    except Exception as error:
        if is_lost_connection(error):
            _let_the_lost_rank_speak()
        print(f"error: rank {rank.rank} failed\n{traceback.format_exc()}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _let_the_lost_rank_speak() -> None:
    """Wait to be ended: a lost connection says that another rank failed, and what it says of that is news.

    The launcher ends all ranks as soon as one is gone; a rank that it does not end speaks after all.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(LOST_RANK_SECONDS)


def exit_now(code: int) -> None:
    """End the process without waiting for threads or collectives of ranks that go on."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a reader such as `head` may have gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_now(main())
