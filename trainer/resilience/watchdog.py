"""Finds the rank that hangs. A collective that times out names none: it says that somebody did not come.

Each rank has a thread that writes to the store where all ranks met, once a second, a *beat*: a count, the
step, the phase, and for how long nothing has moved. Two kinds of hang are seen::

    silent   the count stands still: the process was stopped, swapped out, or its machine is gone.
             Rank r watches rank r + 1, the last one rank 0, so the store has the same few reads a rank
    stuck    the count goes on and nothing else does, neither step nor phase nor the number of collectives
             that were entered or, on a GPU, left: the main thread waits, in a collective for others or,
             where it is to blame, for data. Each rank knows that of itself

After `timeout_seconds` of either, the rank that noticed reads everyone's beats, says who is silent or behind
and which collective it has itself come to (from torch's flight recorder, on NCCL and gloo alike), and tells
all ranks through the store. They leave notes for the crash report and end with exit code 6.

Validation, saves and compilation may take long: there only silence counts, and a validation's comparisons
(`trainer.resilience.stopping`) count as moves.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallelisms.config import CommConfig
from trainer.metrics.meter import DATA_LOADING, TRAINING
from trainer.resilience.notes import write_place

log = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_QUIET_BEATS = 5
"""Beats that a rank on a busy machine may miss before a failed collective is laid at its door."""
_RANKS_PER_SECOND = 500
"""Beats slow down where there are so many ranks, to spare the store."""
_ABORT, _STOP = "octavo/abort", "octavo/stop"
_PHASES_THAT_MOVE = (TRAINING, DATA_LOADING)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int
    step: int
    phase: str
    stuck_seconds: float

    def where(self) -> str:
        """In words."""
        stands = f" for {self.stuck_seconds:.0f} s" if self.stuck_seconds > 5 * _BEAT_SECONDS else ""
        return f"step {self.step}, {self.phase.replace('_', ' ')}{stands}"


class Watchdog:
    """See the module. It does nothing in a run of one process.

    Args:
        place: Gives (step, phase, moves) of the main thread; moves grow while it works.
        timeout_seconds: Of a collective.
        on_hang: Called on every rank, in the thread, with the verdict and whether this rank made it. It is
            to end the process.
        stop_requested: Whether this rank was asked to stop. The beats carry it to all, for a rank that
            waits for data and was not asked itself.
    """

    def __init__(
        self,
        place: Callable[[], tuple[int, str, int]],
        timeout_seconds: float,
        on_hang: Callable[[str, bool], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self._place, self._on_hang, self._stop_requested = place, on_hang, stop_requested
        self.stop_requested_anywhere = False
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._beat = Beat(0, 0, "start", 0.0)
        self._moved = (time.monotonic(), place())
        self._in_flight = ""
        self._stop = threading.Event()
        self._once = threading.Lock()
        self._store: Any = None
        if self._size == 1:
            return
        # A connection of its own: a blocking call of the main thread would hold the beats up.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._seconds = _BEAT_SECONDS * max(1.0, self._size / _RANKS_PER_SECOND)
        self._next = (self._rank + 1) % self._size
        self._next_beat: tuple[float, int] = (time.monotonic(), -1)
        self._thread = threading.Thread(target=self._run, name="octavo-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching: a rank that has ended is silent by right."""
        self._stop.set()
        if self._store is not None:
            with suppress(Exception):
                self._store.set(_key(self._rank), "")
            self._thread.join(timeout=5)

    def verdict(self, only_silent: bool) -> str | None:
        """Who does not answer or is behind, for a collective that failed; None where nobody is."""
        if self._store is None or not self._once.acquire(timeout=10 * self._seconds):
            return None  # the thread is at it, and ends the process
        quiet = time.monotonic() - self._next_beat[0] > _QUIET_BEATS * self._seconds
        with suppress(Exception):
            return self._judge([self._next] if quiet and self._next_beat[1] >= 0 else [], only_silent)
        return None

    def _run(self) -> None:
        with suppress(Exception):  # what the loop meets again, and treats
            self._say()
        while not self._stop.wait(self._seconds):
            try:
                self._say()
                if self._store.check([_ABORT]):
                    self._end(self._store.get(_ABORT).decode(), mine=False)
                elif (silent := self._next_is_silent()) or self._is_stuck():
                    verdict = self._judge(known=[self._next] if silent else [])
                    if verdict is not None and not self._stop.is_set():
                        self._store.set(_ABORT, verdict)
                        self._end(verdict, mine=True)
            except Exception as error:
                # The store is gone, so its host is: the collectives will fail too, and say more.
                log.debug("watchdog: %s", error)
                return

    def _end(self, verdict: str, mine: bool) -> None:
        if self._once.acquire(blocking=False):
            self._on_hang(verdict, mine)

    def _say(self) -> None:
        now, place = time.monotonic(), self._place()
        place = (*place[:2], place[2] + collectives_entered())
        if now - self._moved[0] > self.timeout_seconds / 2 and self._in_flight != (waits := in_flight()):
            self._in_flight, self._moved = waits, (now, place)
        if place != self._moved[1] or place[1] not in _PHASES_THAT_MOVE:
            self._moved = (now, place)
        step, phase, _ = place
        self._beat = Beat(self._beat.count + 1, step, phase, round(now - self._moved[0], 1))
        self._store.set(_key(self._rank), json.dumps(asdict(self._beat)))
        write_place(self._rank, self._beat.where())
        if self._stop_requested():
            self._store.set(_STOP, "")
        self.stop_requested_anywhere = self._store.check([_STOP])

    def _is_stuck(self) -> bool:
        return self._beat.stuck_seconds >= self.timeout_seconds

    def _next_is_silent(self) -> bool:
        now, beat = time.monotonic(), self._read(self._next)
        since, count = self._next_beat
        if beat is None or beat.count != count:
            self._next_beat = (now, -1 if beat is None else beat.count)
            return False
        return now - since >= self.timeout_seconds

    def _read(self, rank: int) -> Beat | None:
        """A rank's beat; None where it has not begun or has ended."""
        if not self._store.check([_key(rank)]):
            return None
        text = self._store.get(_key(rank))
        return Beat(**json.loads(text)) if text else None

    def _beats(self) -> dict[int, Beat]:
        found = {rank: self._read(rank) for rank in range(self._size)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _judge(self, known: list[int], only_silent: bool = False) -> str | None:
        """A verdict; looks twice at all beats where no silent rank is `known`."""
        mine, silent = self._rank, known
        after = before = self._beats()
        if not known:
            time.sleep(2.5 * self._seconds)
            after = self._beats()
            silent = [r for r, beat in after.items() if r != mine and before.get(r) == beat]
        if only_silent and not silent:
            return None
        return _verdict(mine, {**after, mine: self._beat}, silent, last_collective())


def _verdict(mine: int, beats: Mapping[int, Beat], silent: list[int], collective: str) -> str | None:
    """The message: silent ranks if any, else those that are not as far as the others."""
    if silent:
        who = [f"rank {rank} does not answer; it was last at {beats[rank].where()}" for rank in silent[:4]]
    else:
        waiting = [beat for beat in beats.values() if beat.phase == TRAINING]
        most = max((beat.step for beat in waiting), default=0)
        behind = [r for r, b in beats.items() if b.step < most or (b.step == most and b.phase != TRAINING)]
        if not behind:
            return f"no rank goes on, all at {beats[mine].where()}\n  the last collective: {collective}"
        who = [f"rank {rank} does not come: it is at {beats[rank].where()}" for rank in behind[:4]]
    others = f"\n  rank {mine} is at {beats[mine].where()}; its last collective: {collective}"
    return "\n  ".join(who) + others


def collectives_entered() -> int:
    """Collectives that this rank's host has entered so far, over all process groups."""
    entered = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(Exception):  # a backend that does not count
            entered += group._get_sequence_number_for_group()
    return entered


def in_flight() -> str:
    """NCCL's collectives that are not done: a GPU may work for long on what its host has queued."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return ""
    with suppress(Exception):
        entries = json.loads(dump(includeCollectives=True, onlyActive=True)).get("entries", [])
        return json.dumps([(entry["process_group"], entry["collective_seq_id"]) for entry in entries])
    return str(time.monotonic())  # not known, so not stuck: NCCL's own watchdog remains


def last_collective() -> str:
    """What this rank entered last, as torch's flight recorder has it."""
    entries: list[dict[str, Any]] = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            with suppress(Exception):
                entries += json.loads(dump()).get("entries", [])
    if not entries:
        return "not recorded (comm.trace_buf_size is 0)"
    last = max(entries, key=lambda entry: entry["time_created_ns"])
    group = last["process_group"]
    sizes = " ".join("x".join(map(str, size)) or "scalar" for size in last["input_sizes"][:3])
    name = last["profiling_name"]
    return f"{name} {sizes}, number {last['collective_seq_id']} of group {' '.join(group)}, {last['state']}"


def write_flight_record(run_folder: Path, config: CommConfig, rank: int) -> None:
    """Write this rank's last collectives beside NCCL's own dumps, as JSON."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None or config.trace_buf_size == 0:
        return
    folder = run_folder / config.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{config.save_traces_file_prefix}{rank}.json").write_bytes(dump())


def _key(rank: int) -> str:
    return f"octavo/beat/{rank}"
