"""Pipeline schedules: what each asks of stages and micro-batches, and schedules read from a file. Torch-free.

The schedules themselves are those of torch.distributed.pipelining. A schedule file has one line a rank of the
``pp`` axis, with one cell for each thing that the rank does, in order::

    0F0,0F1,,0B0,0B1            stage, kind, micro-batch; an empty cell idles
    ,1F0,1B0,1F1,1B1            F forward, B backward; I and W are B's halves: gradients of input and weights

Messages that travel between stages are no part of the file: they follow from it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallelisms.config import ParallelismConfig


class StageError(ValueError):
    """Stages cannot be made like this; `key` is the setting to blame, within its section."""

    def __init__(self, key: str, message: str):
        self.key = key
        super().__init__(message)


@dataclass(frozen=True)
class Schedule:
    """What a schedule asks of the stages."""

    several_stages: bool = False
    """A rank holds two stages or more; otherwise exactly one."""
    v_shaped: bool = False
    """Stages lie on ranks there and back again, two on each."""
    splits_backward: bool = False
    """Gradients of inputs and of weights are computed apart, to fill the bubble with the latter."""


SCHEDULES: dict[str, Schedule] = {
    "GPipe": Schedule(),
    "1F1B": Schedule(),
    "Interleaved1F1B": Schedule(several_stages=True),
    "LoopedBFS": Schedule(several_stages=True),
    "InterleavedZeroBubble": Schedule(several_stages=True, splits_backward=True),
    "ZBVZeroBubble": Schedule(several_stages=True, v_shaped=True, splits_backward=True),
    "DualPipeV": Schedule(several_stages=True, v_shaped=True, splits_backward=True),
}
"""parallelism.pipeline_parallel_schedule -> its needs; PipelineScheduleMulti is what its file says."""
FROM_FILE = "PipelineScheduleMulti"
"""The schedule that is read from parallelism.pipeline_parallel_schedule_csv."""
_FILE_KEY = "pipeline_parallel_schedule_csv"


@dataclass(frozen=True)
class Action:
    """One cell of a schedule file."""

    stage: int
    kind: str
    """F forward; B backward; I and W its two halves, for the input and for the weights."""
    microbatch: int


def read_schedule(p: ParallelismConfig) -> list[list[Action]]:
    """The schedule file: one line a rank, cells such as ``0F1`` (stage, kind, micro-batch), empty to idle.

    Raises:
        StageError: there is none, or it is malformed.
    """
    key, path = _FILE_KEY, p.pipeline_parallel_schedule_csv
    if not path:
        raise StageError(key, f"{FROM_FILE} takes its order from this file, got none")
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(key, f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    actions: list[list[Action]] = []
    for number, row in enumerate(rows, 1):
        actions.append([])
        for cell in filter(None, row):
            match = re.fullmatch(r"(\d+)([FBIW])(\d+)", cell)
            if match is None:
                raise StageError(
                    key, f"{path}:{number}: got {cell!r}; allowed: cells such as 0F0, 1B0, 1I0, 1W0"
                )
            actions[-1].append(Action(int(match[1]), match[2], int(match[3])))
    if not any(actions):
        raise StageError(key, f"{path} has no actions")
    return actions


def placed_stages(p: ParallelismConfig) -> list[tuple[int, int]]:
    """(stage, rank) of every stage of the schedule file, ascending; its actions are complete."""
    key, path, rows = _FILE_KEY, p.pipeline_parallel_schedule_csv, read_schedule(p)
    if len(rows) != p.pipeline_parallel_degree:
        raise StageError(key, f"{path} has {len(rows)} lines for {p.pipeline_parallel_degree} ranks")
    placed = sorted({(action.stage, rank) for rank, row in enumerate(rows) for action in row})
    if [stage for stage, _ in placed] != list(range(len(placed))):
        raise StageError(key, f"{path} leaves out a stage or gives one to two ranks")
    counts = Counter(action for row in rows for action in row)
    microbatches = 1 + max(action.microbatch for action in counts)
    for stage, _ in placed:
        for index in range(microbatches):
            done = {kind: counts[Action(stage, kind, index)] for kind in "FBIW"}
            if done not in ({"F": 1, "B": 1, "I": 0, "W": 0}, {"F": 1, "B": 0, "I": 1, "W": 1}):
                message = (
                    f"{path}: stage {stage} needs {stage}F{index} and {stage}B{index} (or I and W), once each"
                )
                raise StageError(key, message)
    stuck = _stuck(rows, last_stage=len(placed) - 1)
    if stuck is not None:
        raise StageError(
            key, f"{path}: {stuck.stage}{stuck.kind}{stuck.microbatch} waits for what never comes"
        )
    return placed


def _stuck(rows: list[list[Action]], last_stage: int) -> Action | None:
    """The first action that cannot run when every rank goes through its line; None where all can."""
    done: set[Action] = set()
    rest = [list(reversed(row)) for row in rows]
    while any(rest):
        ready = [row for row in rest if row and _needs(row[-1], last_stage) <= done]
        if not ready:
            return next(row[-1] for row in rest if row)
        for row in ready:
            action = row.pop()
            done.add(action)
            if action.kind in "BI":  # the stage before waits for the input's gradient, however it was made
                done.add(Action(action.stage, "I", action.microbatch))
    return None


def _needs(action: Action, last_stage: int) -> set[Action]:
    stage, index = action.stage, action.microbatch
    if action.kind == "F":
        return {Action(stage - 1, "F", index)} if stage else set()
    if action.kind == "W":
        return {Action(stage, "I", index)}
    after = {Action(stage + 1, "I", index)} if stage < last_stage else set()
    return {Action(stage, "F", index), *after}


def microbatch_problems(p: ParallelismConfig, stages: int, local_batch_size: int) -> Iterator[str]:
    """What the schedule cannot do with the micro-batches that a local batch makes."""
    size, degree, name = (
        p.pipeline_parallel_microbatch_size,
        p.pipeline_parallel_degree,
        p.pipeline_parallel_schedule,
    )
    if local_batch_size % size:
        yield f"{size} does not divide training.local_batch_size = {local_batch_size}"
        return
    count = local_batch_size // size
    made = f"training.local_batch_size {local_batch_size} in micro-batches of {size} makes {count}"
    least = {"1F1B": degree, "DualPipeV": stages}.get(name, 1)
    if count < least:
        yield f"{name} needs at least {least} micro-batches, one per stage; {made}"
    rounds = max(1, count // degree)
    if name in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        yield f"{name} runs micro-batches in rounds of {degree} or a little more, all alike; {made}"
    if name == FROM_FILE:
        wanted = 1 + max(action.microbatch for row in read_schedule(p) for action in row)
        if count != wanted:
            yield f"{p.pipeline_parallel_schedule_csv} is for {wanted} micro-batches; {made}"


def splits_backward(p: ParallelismConfig) -> bool:
    """Whether gradients of inputs and of weights are computed apart."""
    if p.pipeline_parallel_schedule == FROM_FILE:
        return any(action.kind in "IW" for row in read_schedule(p) for action in row)
    return SCHEDULES[p.pipeline_parallel_schedule].splits_backward
