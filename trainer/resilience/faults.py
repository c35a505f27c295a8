"""What the training loop asks about faults, in one object; the parts know nothing of the Trainer.

stopping     signals and clocks, agreed by all ranks      trainer.resilience.stopping
bad_steps    NaN, infinities, spikes                      trainer.resilience.bad_steps
watchdog     a rank that hangs                            trainer.resilience.watchdog
dry_batch    memory runs out before step 1 if at all      trainer.resilience.dry_batch
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from models import MODELS
from parallelisms.blocks import blocks_of
from trainer.data.prefetch import WaitGivenUp
from trainer.optim.clipping import GradNorms
from trainer.resilience import dry_batch
from trainer.resilience.bad_steps import BadSteps, BadStepsError
from trainer.resilience.crash_report import failure_note, leave_failure
from trainer.resilience.exit_codes import EXIT_HUNG
from trainer.resilience.signals import SignalWatch
from trainer.resilience.stopping import Stopping
from trainer.resilience.watchdog import Watchdog, write_flight_record

if TYPE_CHECKING:
    from trainer.trainer import Trainer

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 1.0
_FIRST_PATIENCE_SECONDS = 15.0
"""For data, after a request to stop. The first batch takes longer, and without it nothing can be saved."""


class Faults:
    """See the module. The trainer makes one when model, data and optimizer are there."""

    def __init__(self, trainer: Trainer, signals: SignalWatch | None) -> None:
        config = trainer.config
        self._trainer, self._signals = trainer, signals
        self._position = trainer.data.state_dict()
        self._gave_up = False
        self._asked_since: float | None = None
        self.watchdog: Watchdog | None = None
        self.exit_code = 0
        """What the run ends with where nothing is raised."""
        self.stopping = Stopping(
            signals,
            max_minutes=config.training.max_minutes,
            interval_minutes=config.checkpoint.interval_minutes,
            timeout_seconds=config.comm.init_timeout_seconds,
        )
        self.bad_steps = BadSteps(
            config.resilience,
            self.stopping.group,
            lambda loss: trainer._sum_over_data_ranks(trainer.forward.sum_of_parts(loss)),
        )
        if not (config.compile.enable and "model" in config.compile.components):
            # A hook would become part of each block's graph.
            self.bad_steps.watch(blocks_of(trainer.model, MODELS[config.model.name].blocks))

    @property
    def where(self) -> tuple[int, str]:
        """(step, phase) of the main thread; any thread may ask."""
        trainer = self._trainer
        return trainer.step, trainer.metrics.meter.phases.current

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of training: watch the other ranks, and let a request end a wait for data."""
        trainer = self._trainer
        trainer.data.give_up = self._stop_requested
        if trainer.config.resilience.watch_ranks and dist.get_world_size() > 1:
            self.watchdog = Watchdog(
                lambda: (*self.where, self.stopping.comparisons),
                trainer.config.comm.init_timeout_seconds,
                self._hung,
                self.stopping.requested_here,
            )
        try:
            yield
        except BaseException:
            # It goes on: whoever handles the error asks it who is to blame.
            raise
        else:
            if self.watchdog is not None:
                self.watchdog.close()

    def dry_batch(self) -> None:
        """Where asked for: meet what step 1 would meet, and leave no trace."""
        if self._trainer.config.resilience.dry_batch:
            dry_batch.run(self._trainer)

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around the fetching of a step's batches, which may be given up or given back."""
        self._position = self._trainer.data.state_dict()
        try:
            yield
        except WaitGivenUp:
            self._gave_up = True

    def stop_before_step(self) -> bool:
        """Whether all ranks stop here; then the data is as the last step left it."""
        trainer, stopping = self._trainer, self.stopping
        if not stopping.agreed(has_batch=not self._gave_up):
            return False
        if trainer.step == 0 and stopping.all_have_batches and trainer.checkpoints.saves_at_stop:
            return False  # with one step there is something to save
        trainer.data.load_state_dict(self._position)
        return True

    def stop_in_validation(self) -> bool:
        """Whether all ranks give this validation up."""
        return self.stopping.agreed_within_step()

    def optimizer_step(
        self, loss: Tensor, norm: Tensor, norms: GradNorms | None, grad_scale: Tensor | None
    ) -> None:
        """The optimizer's step unless the step is bad; `grad_scale` is what clipping left to it."""
        trainer = self._trainer
        self.bad_steps.step(
            trainer.optimizer,
            trainer.model.named_parameters(),
            loss=loss,
            norm=norm,
            norms=norms,
            grad_scale=grad_scale,
            step=trainer.step,
            batch=self._batch_in_words(),
        )

    def after_step(self) -> None:
        """Roll back or save, where it is time to."""
        if self.bad_steps.roll_back_due:
            self._roll_back()
        elif self._trainer.checkpoints.due(self._trainer.step, now=self.stopping.save_due):
            self.bad_steps.settle()
            self._save(is_last=False)

    def finish(self) -> None:
        """After the loop: the last save where the run stopped early, and its exit code."""
        trainer, stop = self._trainer, self.stopping.stop
        self.bad_steps.settle()
        early = stop is not None and trainer.step < trainer.config.training.steps
        if early and trainer.step > 0 and trainer.checkpoints.due(trainer.step, now=True):
            self._save(is_last=True)
        with trainer.metrics.excluded("checkpoint"):
            trainer.checkpoints.finish()
        if stop is not None and early:
            saved = trainer.checkpoints.saves_at_stop
            self.exit_code = stop.exit_code(saved)
            rest = "run it again to go on" if saved else "nothing was saved"
            log.info("stopped after step %d: %s; %s (exit code %d)", trainer.step, stop, rest, self.exit_code)
        if self._signals is not None:
            self._signals.ignore_from_now()
        if self.bad_steps.skipped:
            log.info("bad steps: %d skipped", self.bad_steps.skipped)

    def set_timeout(self, seconds: float) -> None:
        """Wait this long for other ranks from now on."""
        self.stopping.set_timeout(seconds)
        if self.watchdog is not None:
            self.watchdog.timeout_seconds = seconds

    def _stop_requested(self) -> bool:
        """Whether to give up waiting for data: a while after a request, which data may still come in."""
        watchdog = self.watchdog
        told = watchdog is not None and watchdog.stop_requested_anywhere
        if not (told or self.stopping.requested_here()):
            return False
        self._asked_since = self._asked_since or time.monotonic()
        patience = _PATIENCE_SECONDS if self._trainer.step > 0 else _FIRST_PATIENCE_SECONDS
        return time.monotonic() - self._asked_since > patience

    def _save(self, is_last: bool) -> None:
        trainer = self._trainer
        with trainer.metrics.excluded("checkpoint"):
            trainer.checkpoints.save(trainer.state, trainer.step, trainer.tokens_seen, is_last=is_last)
        self.stopping.saved(trainer.checkpoints.longest_seconds)

    def _roll_back(self) -> None:
        trainer, skipped = self._trainer, self.bad_steps.skipped
        with trainer.metrics.excluded("checkpoint"):
            place = trainer.checkpoints.roll_back(trainer.state)
        if place is None:
            raise BadStepsError(
                f"{self.bad_steps.in_a_row} bad steps in a row, and there is no checkpoint to roll back to"
            )
        self.bad_steps.rolled_back(skipped)
        log.warning(
            "rolled back from step %d to step %d; the data goes on from where it is", trainer.step, place[0]
        )
        trainer.step, trainer.tokens_seen = place
        for converter in trainer.converters:
            converter.after_optimizer_step(trainer.model)

    def _batch_in_words(self) -> str:
        first, count = self._position["windows"], self._trainer.batch.global_batch_size
        places = [
            f"{source['dataset']} epoch {source['epoch']}"
            + (f", near {source['name']} (document {source['document']})" if "document" in source else "")
            for source in self._position["sources"]
        ]
        return f"sequences {first} to {first + count - 1}, from {'; '.join(places)}"

    def _hung(self, verdict: str, mine: bool) -> None:
        """In the watchdog's thread, while the main thread waits for ever."""
        trainer, (step, phase) = self._trainer, self.where
        with suppress(OSError):
            write_flight_record(trainer.folder, trainer.config.comm, trainer.rank.rank)
        if mine:
            print(f"error: a rank hangs\n  {verdict}", file=sys.stderr, flush=True)
        note = failure_note(None, f"a rank hangs: {verdict}", code=EXIT_HUNG, step=step, phase=phase)
        leave_failure(trainer.rank.rank, Path(trainer.folder), sys.argv[1:], note)
        if mine:
            time.sleep(1.5)  # until the others have read the verdict and left their notes
        os._exit(EXIT_HUNG)
