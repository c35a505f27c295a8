"""Several ranks of one script, without the launcher: for tests that make many runs in the same processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

REPO = Path(__file__).parents[2]


def run_ranks(world_size, script, *arguments, timeout=540):
    """Output of each rank of `script`, a path below the repository; every rank must end with 0.

    The ranks meet at one store that is held here: a port that is chosen now and opened later may be taken by
    then. Each run of theirs needs an `ATTEMPT_VARIABLE` of its own, as each attempt of the launcher has.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(REPO / script), *map(str, arguments)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(out[-3000:] for out in outs)
    return outs
