"""The Trainer: built in numbered steps, then one loop.

    loaded config -> 1 processes -> 2 run folder -> 3 data -> 4 model -> 5 optimizer -> 6 metrics -> train()

Everything that a step does is in `train_step`, what one batch does in `trainer.forward`; what happens around
steps (logging, validation, garbage collection, profiling) is in `train`.
"""

from __future__ import annotations

import gc
import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.support import runs_triton
from models import MODELS
from parallelisms.compile import start_compilers
from parallelisms.distributed import (
    Rank,
    init_process_group,
    seed_step,
    set_collective_timeout,
    set_deterministic,
    shared_seed,
)
from parallelisms.early_gather import gather_early
from parallelisms.mesh import build_mesh
from parallelisms.peer_memory import check_peers, reach_each_other
from trainer import startup
from trainer.arrival import Arrival
from trainer.build import build_model, offloads
from trainer.checkpoint.changes import flat_settings
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.state import RunState
from trainer.config import derived
from trainer.config.device_defaults import with_device_defaults
from trainer.config.errors import ConfigError, Problem
from trainer.config.load import Loaded
from trainer.config.render import as_json
from trainer.data.batches import Batch
from trainer.data.loader import DataLoader, build_dataloader
from trainer.data.settings import loader_settings
from trainer.data.tokenizer import build_tokenizer
from trainer.forward import Forward
from trainer.loss import build_loss
from trainer.metrics.flops import flops_per_token
from trainer.metrics.logger import MetricsLogger
from trainer.optim.clipping import clip_for
from trainer.optim.optimizer import build_optimizer
from trainer.optim.schedule import build_lr_scheduler
from trainer.profiling import MemorySnapshotRecorder, TraceRecorder, explain_out_of_memory
from trainer.resilience.faults import Faults
from trainer.resilience.signals import SignalWatch
from trainer.run_folder import open_run_folder, write_records

log = logging.getLogger(__name__)


class DeviceMemoryError(RuntimeError):
    """The device ran out of memory; the message says what was resident and which settings lower it."""


class Trainer:
    """One rank of a training run; `signals` are the requests to stop that it follows."""

    def __init__(self, loaded: Loaded, rank: Rank, signals: SignalWatch | None = None):
        kernels, peers = runs_triton(rank.device), reach_each_other(rank.device, rank.world_size)
        config = with_device_defaults(loaded.config, kernels=kernels, world_size=rank.world_size, peers=peers)
        self.loaded, self.config, self.rank, self.device = loaded, config, rank, rank.device

        # 1. Processes: compilers, group, mesh, seed.
        start_compilers(config.compile, self.device.type)
        if config.debug.deterministic:
            set_deterministic(config.debug.deterministic_warn_only)
        init_process_group(
            rank,
            config.comm,
            Path(config.job.dump_folder),
            cpu_collectives=offloads(config, rank.device),
        )
        self.mesh = build_mesh(config.parallelism, self.device.type, rank.world_size)
        if config.parallelism.fsdp_transport == "copy_engine":
            with _as_config_error(loaded, "parallelism.fsdp_transport"):
                check_peers(self.mesh.fsdp)
        self.checkpoints = CheckpointManager(loaded)
        self.seed = shared_seed(self.checkpoints.seed(config.debug.seed), self.device)
        self.batch = derived.batch_arithmetic(config, rank.world_size)
        startup.announce_run(loaded, rank, self.mesh, self.seed)

        # 2. Run folder.
        self.folder = open_run_folder(loaded, rank.rank)

        # 3. Data.
        with _as_config_error(loaded, "model.hf_assets_path"):
            self.tokenizer = build_tokenizer(config.model.hf_assets_path)
        self.data = self._build_data("training", self.seed, infinite=True)
        startup.announce_data(config, self.batch)

        # 4. Model.
        with self._out_of_memory_explained():
            built = build_model(config, self.mesh, self.device, self.seed)
        self.model, self.converters = built.model, built.converters
        self.flops_per_token = flops_per_token(built.flop_inputs, config.training.seq_len)
        startup.announce_model(config, built, self.flops_per_token)

        # 5. Loss, optimizer, learning rate.
        self.loss_fn = build_loss(config.training, config.compile)
        self.forward = Forward(config, built, self.mesh, self.device, self.loss_fn)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        if built.direct is not None:
            built.direct.attach(self.optimizer)
        if built.stages is None:
            gather_early(self.model, MODELS[config.model.name].blocks, self.optimizer)
        for converter in self.converters:
            converter.optimizer_built(self.model, self.optimizer)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.lr_scheduler, config.training.steps)

        # 6. Faults, checkpoint, metrics and records.
        self.faults = Faults(self, signals)
        self.state = RunState(
            self.model,
            self.optimizer,
            self.lr_scheduler,
            self.data,
            self.converters,
            built.fqns,
            self.seed,
            rank.rank,
            rank.world_size,
            flat_settings(loaded.values),
            self.faults.bad_steps,
        )
        self.step, self.tokens_seen = self.checkpoints.restore(self.state)
        self.metrics = self._build_metrics()
        devices = self._device_names()
        if rank.rank == 0:
            reports = [report.to_dict() for report in built.reports]
            write_records(self.folder, loaded, seed=self.seed, devices=devices, reports=reports)
        log.info("run folder: %s", self.folder)

    def train(self) -> None:
        """Run all steps that are left."""
        config, metrics, first_step = self.config, self.metrics, self.step + 1
        if config.checkpoint.create_seed_checkpoint:
            self.checkpoints.save(self.state, step=0, tokens_seen=0)
            return
        profiled = config.profiling.enable_profiling or config.profiling.enable_memory_snapshot
        gc.disable()
        batches = iter(self.data)
        with ExitStack() as stack:
            stack.callback(self.data.close)
            stack.callback(metrics.close)
            stack.enter_context(self._out_of_memory_explained())
            trace = stack.enter_context(
                TraceRecorder(
                    config.profiling, self.folder, rank=self.rank.rank, last_step=config.training.steps
                )
            )
            snapshots = stack.enter_context(
                MemorySnapshotRecorder(config.profiling, self.folder, device=self.device, rank=self.rank.rank)
            )
            stack.enter_context(self.faults.watching())
            self.faults.dry_batch()
            metrics.start()
            while self.step < config.training.steps:
                micro_batches = self._next_batches(batches)
                if self.faults.stop_before_step():
                    break
                self.step += 1
                self.train_step(micro_batches)
                if self._validation_due():
                    self.validate()
                if profiled:
                    with metrics.excluded("profiling"):
                        trace.step()
                        snapshots.step()
                self.faults.after_step()
                if self.step == first_step:
                    set_collective_timeout(self.mesh.groups, config.comm.train_timeout_seconds)
                    self.faults.set_timeout(config.comm.train_timeout_seconds)
                if self.step % config.training.gc_freq == 0:
                    self._collect_garbage()
            self.faults.finish()
            metrics.finish(self.step, tokens_seen=self.tokens_seen)

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step over all micro-batches, and its log line where one is due."""
        seed_step(self.seed, self.step)
        for converter in self.converters:
            converter.before_step(self.model, self.step)
        valid_here = sum(batch.label_count for batch in micro_batches)
        # Filled on the device: a number that is copied there waits for all that was launched before.
        valid = self._sum_over_data_ranks(torch.full((), float(valid_here), device=self.device))
        loss = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches, 1):
            loss += self.forward.forward_backward(batch, valid, last=index == len(micro_batches))
        self.metrics.settle()
        for converter in self.converters:
            converter.after_backward(self.model)
        norms = self.faults.bad_steps.new_norms()
        max_norm, stages = self.config.training.max_norm, self.mesh.stage_group
        grad_norm, factor = clip_for(self.optimizer, self.model.parameters(), max_norm, stages, norms)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.checkpoints.before_update()
        self.faults.optimizer_step(loss, grad_norm, norms, factor)
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for converter in self.converters:
            converter.after_optimizer_step(self.model)
        self.tokens_seen += self.batch.tokens_per_step
        self.metrics.count_step(sum(batch.tokens.numel() for batch in micro_batches))
        if self.metrics.should_log(self.step) or self.step == self.config.training.steps:
            self._log_step(loss, loss * valid / max(valid_here, 1), grad_norm, lr)

        for converter in self.converters:
            self.metrics.log_scalars(self.step, converter.metrics(self.model))

    def validate(self) -> None:
        """Mean loss over the validation set, or over its first `validation.steps` batches."""
        with self.metrics.excluded("validation"):
            self.model.eval()
            totals = torch.zeros(2, dtype=torch.float64, device=self.device)
            data = self._build_data("validation", seed=0, infinite=False)
            limit = self.config.validation.steps
            for index, batch in enumerate(data):
                if index == limit or self.faults.stop_in_validation():
                    break
                totals[0] += self.forward.evaluate(batch)
                totals[1] += batch.label_count
            data.close()
            self.model.train()
            if self.faults.stopping.stop is not None:
                return
            self.forward.sum_of_parts(totals[:1])
            totals = self._sum_over_data_ranks(totals)
            loss = float(totals[0] / totals[1])
        self.metrics.log_validation(self.step, loss)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()

    # What the steps above are made of.

    def _collect_garbage(self) -> None:
        """All ranks at the same step, so that none waits for another's; with gc_debug, what was found."""
        if not self.config.training.gc_debug:
            gc.collect(1)
            return
        found = gc.collect()
        log.info("gc: %d objects in reference cycles up to step %d", found, self.step)

    def _next_batches(self, batches: Iterator[Batch]) -> list[Batch]:
        found: list[Batch] = []
        errors = _as_config_error(self.loaded, "training.dataset")
        with self.metrics.data_loading(), errors, self.faults.data_wait():
            found += [next(batches) for _ in range(self.batch.gradient_accumulation_steps)]
        return found

    def _sum_over_data_ranks(self, values: Tensor) -> Tensor:
        """Sum over all ranks with different data; on a GPU nothing waits for it."""
        if self.batch.dp_degree > 1:
            dist.all_reduce(values, group=self.mesh.data_group)
        return values

    def _log_step(self, loss: Tensor, own_mean_loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        loss, own_mean_loss = self.forward.sum_of_parts(torch.stack([loss, own_mean_loss]))
        total = self._sum_over_data_ranks(loss.clone())
        if self.batch.dp_degree > 1:
            dist.all_reduce(own_mean_loss, dist.ReduceOp.MAX, group=self.mesh.data_group)
        # Gradients may be offloaded to the host, and their norm with them.
        numbers = torch.stack([t.detach().to(total).double() for t in (total, own_mean_loss, grad_norm)])
        self.metrics.log_arrival(self.step, Arrival(numbers), lr=lr, tokens_seen=self.tokens_seen)

    def _validation_due(self) -> bool:
        v = self.config.validation
        return v.enable and (self.step == 1 or self.step % v.freq == 0)

    def _build_data(self, name: str, seed: int, *, infinite: bool) -> DataLoader:
        section = getattr(self.config, name)
        key = f"{name}.dataset_path" if section.dataset_path else f"{name}.dataset"
        with _as_config_error(self.loaded, key):
            return build_dataloader(
                **loader_settings(self.config, name),
                tokenizer=self.tokenizer,
                dp_rank=self.mesh.dp_rank,
                dp_degree=self.mesh.dp_degree,
                seed=seed,
                infinite=infinite,
                pin_memory=self.device.type == "cuda",
            )

    def _build_metrics(self) -> MetricsLogger:
        compiled = self.config.compile.enable
        with _as_config_error(self.loaded, "metrics"):
            return MetricsLogger(
                self.config.metrics,
                self.folder,
                flops_per_token=self.flops_per_token,
                device=self.device,
                total_steps=self.config.training.steps,
                non_data_parallel_degree=self.mesh.non_data_parallel_degree,
                rank=self.rank.rank,
                is_metrics_rank=self.rank.rank == 0,
                resume_step=self.step or None,
                watch_compile=compiled,
                run_config={"config": as_json(self.loaded)},
            )

    def _device_names(self) -> list[str]:
        mine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        names: list[Any] = [None] * self.rank.world_size
        dist.all_gather_object(names, f"{platform.node()}: {mine}")
        return names

    @contextmanager
    def _out_of_memory_explained(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            optimizers = [self.optimizer] if hasattr(self, "optimizer") else []
            parameters = self.model.parameters() if optimizers else ()
            settings = dict(self.loaded.values)
            message = explain_out_of_memory(error, self.device, parameters, optimizers, settings)
            raise DeviceMemoryError(message) from error


@contextmanager
def _as_config_error(loaded: Loaded, key: str) -> Iterator[None]:
    """Turn a ValueError about what the user gave into a message without a traceback."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        where = loaded.problem(key, str(error)) if key in loaded.origins else Problem(key, str(error))
        raise ConfigError([where]) from error
