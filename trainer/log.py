"""Console output of a run: plain lines on stdout, warnings marked, errors on stderr.

A rank whose number is not in LOG_RANK (``0``, or a list such as ``0,3``) shows warnings of its own never and
errors always: what goes wrong on a hidden rank must be seen. Where several ranks are shown, or an error
comes from any rank of several, the line begins with the rank.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings


def setup_logging(rank: int = 0, world_size: int = 1) -> None:
    """Send all of the project's loggers to the console, as the head of this file says."""
    shown = {part.strip() for part in os.environ.get("LOG_RANK", "0").split(",")}
    visible = str(rank) in shown
    logging.raiseExceptions = False  # a reader of our output that has gone (`| head`) does not end a run
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    out = logging.StreamHandler(sys.stdout)
    out.setFormatter(_LineFormatter(rank if len(shown) > 1 and world_size > 1 else None))
    out.addFilter(lambda record: visible and record.levelno < logging.ERROR)
    err = logging.StreamHandler(sys.stderr)
    err.setFormatter(_LineFormatter(rank if world_size > 1 else None))
    err.setLevel(logging.ERROR)
    root.addHandler(out)
    root.addHandler(err)
    for name in ("trainer", "models", "converters", "parallelisms", "kernels"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    # FSDP2 warns of in-place changes to a unit's output that is a view; nothing here changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class _LineFormatter(logging.Formatter):
    """The message alone at level INFO, with its level before it above."""

    def __init__(self, rank: int | None):
        super().__init__()
        self._prefix = "" if rank is None else f"[rank {rank}] "

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{self._prefix}{level}{message}"
