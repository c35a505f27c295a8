"""What every worker runs: load the configuration, train, and end with an exit code that means something.

0  trained to the end
1  failed: the traceback is on stderr, whatever LOG_RANK says
2  bad input (configuration, data, tokenizer): a message of a few lines
3  the device ran out of memory: what was resident and which settings lower it
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from trainer.packages import require_own_packages

EXIT_FAILED = 1
EXIT_OUT_OF_MEMORY = 3

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    require_own_packages()
    from parallelisms.distributed import Rank
    from trainer.config.errors import EXIT_BAD_INPUT, ConfigError
    from trainer.config.preflight import preflight
    from trainer.log import setup_logging
    from trainer.trainer import DeviceMemoryError, Trainer

    rank = Rank.from_env()
    setup_logging(rank.rank, rank.world_size)
    try:
        loaded = preflight(list(sys.argv[1:] if argv is None else argv), rank.world_size)
        trainer = Trainer(loaded, rank)
        trainer.train()
        trainer.close()
    except ConfigError as error:
        # Every rank meets the same bad input; one message is enough.
        if rank.rank == 0 or not _is_shared(error):
            print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    except DeviceMemoryError as error:
        log.error("%s", error)
        return EXIT_OUT_OF_MEMORY
    except Exception:
        print(f"error: rank {rank.rank} failed\n{traceback.format_exc()}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _is_shared(error: Exception) -> bool:
    """Whether all ranks see the same error: true of a configuration, not of a rank's own data."""
    return not isinstance(error.__cause__, ValueError)


def exit_now(code: int) -> None:
    """End the process without waiting for threads or collectives of ranks that go on."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


if __name__ == "__main__":
    exit_now(main())
