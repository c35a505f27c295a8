"""Run once a rank by tests/integration/test_pipeline_parallel.py: several runs, one after the other.

    python pipeline_worker.py FOLDER '[["NAME", ["--flag", ...]], ...]'

Each run writes FOLDER/NAME as any run does. Some labels are ignored, by what a sequence holds and so alike in
every layout: a few of one sequence, nearly all of another.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from parallelisms.distributed import ATTEMPT_VARIABLE, Rank  # noqa: E402
from trainer.config.preflight import preflight  # noqa: E402
from trainer.data.packing import IGNORED_LABEL  # noqa: E402
from trainer.log import setup_logging  # noqa: E402
from trainer.trainer import Trainer  # noqa: E402


def some_ignored(batches):
    for batch in batches:
        S = batch.labels.shape[1]
        first_kept = (batch.tokens.sum(1) % S)[:, None]
        labels = torch.where(torch.arange(S) >= first_kept, batch.labels, IGNORED_LABEL)
        yield batch._replace(labels=labels, label_count=int((labels != IGNORED_LABEL).sum()))


class IgnoringTrainer(Trainer):
    def train_step(self, batches):
        super().train_step(list(some_ignored(batches)))


def main():
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = Rank.from_env()
    torch.set_num_threads(1)
    setup_logging(rank.rank, rank.world_size)
    for name, flags in runs:
        os.environ[ATTEMPT_VARIABLE] = name
        config = f"--job.config_file={REPO}/train_configs/debug_model.toml"
        trainer = IgnoringTrainer(
            preflight([config, *flags, f"--job.dump_folder={folder / name}"], rank.world_size), rank
        )
        trainer.train()
        dist.barrier()
        trainer.close()
        gc.enable()
        torch._dynamo.reset()  # compiled code knows the process groups that were


if __name__ == "__main__":
    main()
