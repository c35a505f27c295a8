"""What a run says of itself before its first step: versions, mesh, batch, model, what was done to it."""

from __future__ import annotations

import logging

import torch

from parallelisms.distributed import Rank
from parallelisms.mesh import Mesh, picture
from trainer import __version__
from trainer.build import BuiltModel, offloads
from trainer.config import checks
from trainer.config.derived import BatchArithmetic
from trainer.config.job import JobConfig
from trainer.config.load import Loaded
from trainer.config.render import as_json
from trainer.data.datasets import dataset_note
from trainer.data.settings import describe_data

log = logging.getLogger(__name__)


def announce_run(loaded: Loaded, rank: Rank, mesh: Mesh, seed: int) -> None:
    """Versions and devices, what to know of the configuration, the mesh."""
    config = loaded.config
    name = torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else "cpu"
    log.info("octavo %s, torch %s, %d x %s", __version__, torch.__version__, rank.world_size, name)
    log.info("Starting job: %s", config.job.description)
    for note in loaded.notes:
        log.info("note: %s", note)
    for line in checks.warnings(loaded):
        log.warning("%s", line)
    if config.training.enable_cpu_offload and not offloads(config, rank.device):
        log.warning("training.enable_cpu_offload has no effect: the device is the CPU")
    if config.job.print_config:
        log.info("%s", as_json(loaded))
    drawn = " (drawn; set debug.seed to repeat the run)" if config.debug.seed is None else ""
    log.info("mesh: %s; seed %d%s", mesh.describe(), seed, drawn)
    for line in picture(mesh.degrees):
        log.info("  %s", line)


def announce_data(config: JobConfig, batch: BatchArithmetic) -> None:
    """The batch arithmetic, and where the text is from."""
    training = config.training
    note = None if training.mixture else dataset_note(training.dataset, training.dataset_path)
    if note:
        log.info("note: %s", note)
    log.info(
        "batch: %d local x %d ranks x %d accumulated = %d sequences of %d: %s tokens per step, from %s",
        batch.local_batch_size,
        batch.dp_degree,
        batch.gradient_accumulation_steps,
        batch.global_batch_size,
        batch.seq_len,
        f"{batch.tokens_per_step:,}",
        describe_data(config),
    )


def announce_model(config: JobConfig, built: BuiltModel, flops_per_token: int) -> None:
    """Size, overrides, and one line for each thing that was done to the model."""
    overrides = config.model.overrides
    log.info(
        "model: %s %s%s: %s parameters, %s FLOP per token",
        config.model.name,
        config.model.flavor,
        f" with {', '.join(f'{k}={v}' for k, v in overrides.items())}" if overrides else "",
        f"{built.flop_inputs.parameters:,}",
        f"{flops_per_token:,}",
    )
    for report in built.reports:
        for line in report.lines():
            log.info("%s", line)
    if config.model.print_after_conversion:
        log.info("%s", built.model)
    for line in built.notes:
        log.info("%s", line)
