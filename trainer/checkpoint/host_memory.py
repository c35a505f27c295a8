"""How much host memory may still be taken: what the kernel can give, and what the container's limit leaves.

Page-locked memory is never swapped out, so a host that gives too much of it away ends processes instead.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.ranks import Ranks
from trainer.config.errors import ConfigError, Problem

_CONTAINER = Path("/sys/fs/cgroup")


def available_bytes(container: Path = _CONTAINER) -> int:
    """Bytes that this host can still give to its processes, page cache that it can drop included."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group of version 2, or "max": no limit
        limit = int((container / "memory.max").read_text())
        used = int((container / "memory.current").read_text())
        lines = (container / "memory.stat").read_text().splitlines()
        cache = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free = min(free, max(0, limit - used + cache))
    return free


def check_host_memory(needed: int, ranks: Ranks) -> None:
    """Check that each host has room for the shares of its own ranks; all ranks call it.

    Args:
        needed: Bytes of page-locked memory that this rank will take.
        ranks: All of them.

    Raises:
        ConfigError: one has not; on every rank.
    """
    found = ranks.gather((platform.node(), needed, available_bytes()))
    for host in sorted({name for name, _, _ in found}):
        shares = [share for name, share, _ in found if name == host]
        free = min(bytes_free for name, _, bytes_free in found if name == host)
        if sum(shares) > free:
            message = (
                f"'async_with_pinned_mem' keeps {sum(shares) / 1e9:,.2f} GB of memory on {host} "
                f"(ranks there: {len(shares)})\n"
                f"  it has {free / 1e9:,.2f} GB left\n"
                "  use 'async', which needs that much during a save only, or 'disabled', which needs none"
            )
            raise ConfigError([Problem("checkpoint.async_mode", message)])
