"""torchrun's elastic agent, with the ways of this project: how signals, failures and restarts are treated.

signals     torchrun ends its workers when it gets one, and kills them after 30 s, saved or not. Here a
            request to stop is forwarded (`trainer.resilience.signals`) and the workers end by themselves,
            when they have saved
a failure   the other workers cannot go on: they are killed, not asked, and quickly. After a hang they
            have a moment to say what they know
a restart   comes after a failure that may not happen again. Bad input, a full device, an unusable
            checkpoint and diverged training would: they end the run
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from parallelisms.distributed import ATTEMPT_VARIABLE
from trainer.resilience.exit_codes import EXIT_FAILED, EXIT_HUNG
from trainer.resilience.signals import FORWARDED, handled_signals

_LAST_WORDS_SECONDS = 2.0

Failure = tuple[int, int]
"""Rank that failed first, and its exit code: negative where a signal ended it."""


class Agent(LocalElasticAgent):
    """See the module.

    Args:
        spec: Of the workers.
        config: Of the launch.
        on_failure: Called with (failure, restarts left) after each failure, before a restart.
    """

    def __init__(
        self, spec: WorkerSpec, config: LaunchConfig, on_failure: Callable[[Failure, int], None]
    ) -> None:
        assert config.logs_specs is not None
        super().__init__(spec=spec, logs_specs=config.logs_specs, start_method=config.start_method)
        self._on_failure = on_failure
        self.requests: list[int] = []
        self.failure: Failure | None = None

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Handle a request to stop: pass it to the workers."""
        self.requests.append(number)
        workers = self._live_workers()
        if not workers:  # waiting for other machines, or between two attempts
            raise SignalException("asked to stop", signal.Signals(number))
        for worker in workers:
            if worker.poll() is None:
                os.kill(worker.pid, FORWARDED[signal.Signals(number)])

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Name the attempt, alike on all machines: the workers' keys in the store go under that name."""
        store = worker_group.store
        assert store is not None
        if worker_group.group_rank == 0:
            store.set(ATTEMPT_VARIABLE, uuid.uuid4().hex)
        os.environ[ATTEMPT_VARIABLE] = store.get(ATTEMPT_VARIABLE).decode()
        return super()._start_workers(worker_group)

    def _live_workers(self) -> list[subprocess.Popen[bytes]]:
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handler.proc for handler in handlers.values() if handler.proc.poll() is None]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.failure = self._first_failure(worker_group)
        if self.failure is not None:
            code = self.failure[1]
            deadline = time.monotonic() + (_LAST_WORDS_SECONDS if code == EXIT_HUNG else 0)
            while time.monotonic() < deadline and any(map(_runs, self._live_workers())):
                time.sleep(0.05)
            self._kill()
            if self.requests or not _may_not_happen_again(code):
                self._remaining_restarts = 0
            self._on_failure(self.failure, self._remaining_restarts)
        result = super()._monitor_workers(worker_group)
        if self.failure is None and result.state == WorkerState.FAILED:
            # It failed between our look and torchrun's.
            rank, failed = min(result.failures.items(), key=lambda item: item[1].timestamp)
            self.failure = (rank, failed.exitcode)
            if self.requests or not _may_not_happen_again(failed.exitcode):
                self._remaining_restarts = 0
            self._on_failure(self.failure, self._remaining_restarts)
        return result

    def _first_failure(self, worker_group: WorkerGroup) -> Failure | None:
        """A signal from outside before an error: a rank whose peer is killed soon fails itself."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        codes = {worker_group.workers[local].global_rank: h.proc.poll() for local, h in handlers.items()}
        failed = [(rank, code) for rank, code in codes.items() if code not in (None, 0)]
        return min(failed, key=lambda item: (item[1] > 0, item[0]), default=None)

    def _kill(self) -> None:
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        self._kill()
        super()._shutdown(*args, **kwargs)


def run_agent(
    config: LaunchConfig, entrypoint: str, args: Sequence[str], on_failure: Callable[[Failure, int], None]
) -> tuple[Failure | None, list[int]]:
    """Run the workers to their end.

    Returns:
        (the failure that ended the run, the requests to stop that came).
    """
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(args),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
    )
    agent = Agent(spec, config, on_failure)
    # torchrun installs handlers for these whenever it starts workers, over ours: leave it a rare one.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    for number in handled_signals():
        signal.signal(number, agent.forward)
    try:
        result = agent.run()
    except SignalException as error:
        return (0, -int(error.sigval)), agent.requests
    finally:
        for number in handled_signals():
            signal.signal(number, signal.SIG_IGN)  # the run is over: nothing is left to stop
        spec.rdzv_handler.shutdown()
    return (agent.failure or (0, EXIT_FAILED)) if result.is_failed() else None, agent.requests


def _runs(worker: subprocess.Popen[bytes]) -> bool:
    """False for a process that was stopped: it has nothing to say."""
    with suppress(psutil.Error):
        return psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED
    return False


def _may_not_happen_again(code: int) -> bool:
    return code < 0 or code in (EXIT_FAILED, EXIT_HUNG)
