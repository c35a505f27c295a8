"""Run by tests/integration/test_checkpoint.py, once a rank: saves and loads under several layouts.

    python layouts_worker.py FOLDER make|load LAYOUT...

`make` trains two steps under each layout, saves FOLDER/LAYOUT and trains on. `load` loads each of these
under each other layout. Both write FOLDER/{source}-as-{layout}.json: hashes of the state at step 2, and
the losses after it.
"""

import gc
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

REPO = Path(__file__).parents[3]
sys.path.insert(0, str(REPO))

from parallelisms.distributed import ATTEMPT_VARIABLE, Rank  # noqa: E402
from trainer.config.preflight import preflight  # noqa: E402
from trainer.log import setup_logging  # noqa: E402
from trainer.metrics.history import read_history  # noqa: E402
from trainer.trainer import Trainer  # noqa: E402

LAYOUTS = {
    "one": [],
    "fsdp2": [],
    "ddp2": ["--parallelism.data_parallel_replicate_degree=2"],
    "tp2": ["--parallelism.tensor_parallel_degree=2"],
    "fsdp2_tp2": ["--parallelism.tensor_parallel_degree=2"],
    "pp2": ["--parallelism.pipeline_parallel_degree=2"],
    "pp2_v": [
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
    ],
    "pp2_fsdp2": [
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    ],
    "hsdp2x2": ["--parallelism.data_parallel_replicate_degree=2"],
}
FLAGS = [
    "--metrics.log_freq=1",
    "--training.seq_len=32",
    "--training.local_batch_size=2",
    "--training.global_batch_size=8",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=2",
    "--lr_scheduler.total_steps=10",
    "--model.overrides.n_layers=2",
    "--model.overrides.dim=36",  # leaves a rank without a row of some weights
    "--model.overrides.n_heads=2",
    "--model.overrides.n_kv_heads=2",
    "--model.overrides.multiple_of=18",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--debug.seed=1",
]


def train(task, folder, layout, steps, observe=False):
    """Run up to `steps` in `folder`; with `observe`, returns hashes of what the run begins with."""
    os.environ[ATTEMPT_VARIABLE] = f"{task}/{next(RUNS)}"
    config = f"--job.config_file={REPO}/train_configs/debug_model.toml"
    flags = [config, *FLAGS, *LAYOUTS[layout], f"--training.steps={steps}", f"--job.dump_folder={folder}"]
    rank = Rank.from_env()
    trainer = Trainer(preflight(flags, rank.world_size), rank)
    hashes = state_hashes(trainer) if observe else None
    trainer.train()
    dist.barrier()
    trainer.close()
    gc.enable()
    return hashes


def state_hashes(trainer):
    """Digest of every parameter and moment, whole."""
    digests = {}
    for key, tensor in trainer.state.tensors("full").items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digests[key] = hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    return {key: digest for each in everyone for key, digest in each.items()}  # of all pipeline stages


def main():
    torch.set_num_threads(1)
    root, task, layouts = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank = int(os.environ["RANK"])
    setup_logging(rank, int(os.environ["WORLD_SIZE"]))
    for layout in layouts:
        if task == "make":
            train(task, root / layout, layout, 2)
        others = sorted(path.name for path in root.iterdir() if path.name in LAYOUTS and path.name != layout)
        sources = [layout] if task == "make" else others
        for source in sources:
            name = f"{source}-as-{layout}"
            if rank == 0:
                shutil.copytree(root / source, root / name)
            # Other ranks wait for the copy: they meet rank 0 before anyone looks into the folder.
            hashes = train(task, root / name, layout, 4, observe=True)
            if rank == 0:
                losses = read_history(root / name).curve("loss")[1]
                (root / f"{name}.json").write_text(json.dumps({"hashes": hashes, "losses": losses}))


if __name__ == "__main__":
    RUNS = itertools.count()
    main()
