"""Which part of a model each pipeline stage holds, and which rank holds the stage. Torch-free.

A pipeline cuts the model into stages, run one after the other. Every rank of the ``pp`` axis holds one stage,
or several where the schedule interleaves them (Narayanan et al. 2021, arXiv 2104.04473, section 2.2)::

    loop   stage s on rank s mod p          p = 2, 4 stages: rank 0 has 0 and 2, rank 1 has 1 and 3
    V      there and back again             p = 2, 4 stages: rank 0 has 0 and 3, rank 1 has 1 and 2

The automatic split counts the embedding as `first_stage_less_layers` layers and norm and output as
`last_stage_less_layers`: all these "layers" are dealt out evenly, and earlier stages take what is left over.
Modules keep the FQNs of the whole model: ``layers.7`` is ``layers.7`` on whatever stage it lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from parallelisms.config import ParallelismConfig
from parallelisms.pipeline_schedules import FROM_FILE, SCHEDULES, StageError, placed_stages

_PREFIX = "pipeline_parallel_"


@dataclass(frozen=True)
class StageLayout:
    """The stages of a model and where they are."""

    fqns: tuple[tuple[str, ...], ...]
    """Per stage, the FQNs of its blocks and of the modules outside the blocks, in model order."""
    ranks: tuple[int, ...]
    """Per stage, the rank on the ``pp`` axis that holds it."""

    @property
    def count(self) -> int:
        """Stages in all."""
        return len(self.fqns)

    def of_rank(self, rank: int) -> list[int]:
        """The stages that `rank` holds, ascending."""
        return [stage for stage, holder in enumerate(self.ranks) if holder == rank]

    def describe(self) -> str:
        """One line: what the stages hold, in order."""
        return " | ".join(_short(names) for names in self.fqns)


def stage_layout(
    p: ParallelismConfig, n_layers: int, *, blocks: str, before: Sequence[str], after: Sequence[str]
) -> StageLayout:
    """Cut a model of `n_layers` blocks into the stages that `p` asks for.

    Args:
        p: The parallelism section; its degree may be 1 (one stage holds everything).
        n_layers: Blocks of the model.
        blocks: FQN of the block list: blocks are ``{blocks}.0``, ``{blocks}.1``, ...
        before: FQNs of the modules before the blocks (the embedding).
        after: FQNs of the modules after them (norm, output), in order.

    Raises:
        StageError: the settings contradict each other or the model.
    """
    layers = [f"{blocks}.{layer}" for layer in range(n_layers)]
    whole = [*before, *layers, *after]
    degree = p.pipeline_parallel_degree
    if degree == 1:
        return StageLayout((tuple(whole),), (0,))
    if p.module_fqns_per_model_part is not None:
        parts = _explicit(p.module_fqns_per_model_part, whole)
        key, how = "module_fqns_per_model_part", f"{len(parts)} parts"
    elif p.pipeline_parallel_schedule == FROM_FILE:
        parts = _automatic(p, placed_stages(p)[-1][0] + 1, layers, before, after)
        key, how = f"{_PREFIX}schedule_csv", f"{len(parts)} stages"
    else:
        count, how = _stage_count(p, n_layers)
        key = f"{_PREFIX}{'degree' if p.pipeline_parallel_layers_per_stage is None else 'layers_per_stage'}"
        if count % degree == 0:  # else the count itself is wrong, and said below
            parts = _automatic(p, count, layers, before, after)
        else:
            parts = [()] * count
    return StageLayout(tuple(parts), _ranks(p, len(parts), key, how))


def outside_blocks(roles: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(modules before the blocks, modules after them) by a model's role table."""
    outside = [(fqn, str(getattr(role, "value", role))) for fqn, role in roles.items() if "*" not in fqn]
    return (
        [fqn for fqn, role in outside if role == "embedding"],
        [fqn for fqn, role in outside if role != "embedding"],
    )


def _stage_count(p: ParallelismConfig, n_layers: int) -> tuple[int, str]:
    """(stages, how that came about)."""
    per_stage = p.pipeline_parallel_layers_per_stage
    if per_stage is None:
        per_rank = 2 if SCHEDULES[p.pipeline_parallel_schedule].several_stages else 1
        count = per_rank * p.pipeline_parallel_degree
        return count, f"{count} stages"
    first, last = p.pipeline_parallel_first_stage_less_layers, p.pipeline_parallel_last_stage_less_layers
    count = -(-(n_layers + first + last) // per_stage)
    return (
        count,
        f"{n_layers} layers, {first} + {last} for embedding and output, {per_stage} a stage: {count} stages",
    )


def _automatic(
    p: ParallelismConfig, count: int, layers: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> list[tuple[str, ...]]:
    first, last = p.pipeline_parallel_first_stage_less_layers, p.pipeline_parallel_last_stage_less_layers
    share, extra = divmod(len(layers) + first + last, count)
    if share == 0:
        key = "degree" if p.pipeline_parallel_layers_per_stage is None else "layers_per_stage"
        raise StageError(f"{_PREFIX}{key}", f"{count} stages for {len(layers)} layers; allowed: fewer stages")
    sizes = [share + (stage < extra) for stage in range(count)]
    sizes[0] -= first
    sizes[-1] -= last
    for place, size, less in (("first", sizes[0], first), ("last", sizes[-1], last)):
        if size < 0:
            message = f"{less} is more than a stage has: {len(layers)} layers in {count} stages"
            raise StageError(f"{_PREFIX}{place}_stage_less_layers", message)
    parts, start = [], 0
    for stage, size in enumerate(sizes):
        names = [*(before if stage == 0 else ()), *layers[start : start + size]]
        names += after if stage == count - 1 else ()
        parts.append(tuple(names))
        start += size
    return parts


def _explicit(given: Sequence[Sequence[str]], whole: Sequence[str]) -> list[tuple[str, ...]]:
    key, known = "module_fqns_per_model_part", set(whole)
    flat = [name for part in given for name in part]
    unknown = [name for name in flat if name not in known]
    if unknown:
        raise StageError(key, f"{unknown[0]!r} is no module of this model; its parts are {_short(whole)}")
    missing = [name for name in whole if name not in flat]
    if missing:
        raise StageError(key, f"leaves out {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}")
    twice = [name for name, times in Counter(flat).items() if times > 1]
    if twice:
        raise StageError(key, f"names {twice[0]} more than once")
    if not all(given):
        raise StageError(key, f"part {[bool(part) for part in given].index(False)} is empty")
    place = {name: index for index, name in enumerate(whole)}
    parts = [tuple(sorted(part, key=place.__getitem__)) for part in given]
    for earlier, later in pairwise(parts):
        if place[earlier[-1]] > place[later[0]]:
            raise StageError(key, f"{later[0]} comes after {earlier[-1]}, but the model runs it before")
    return parts


def _ranks(p: ParallelismConfig, count: int, key: str, how: str) -> tuple[int, ...]:
    degree, name = p.pipeline_parallel_degree, p.pipeline_parallel_schedule
    if name == FROM_FILE:
        placed = placed_stages(p)
        if len(placed) != count:
            raise StageError(key, f"{how}, but {p.pipeline_parallel_schedule_csv} has {len(placed)} stages")
        return tuple(rank for _, rank in placed)
    schedule = SCHEDULES[name]
    per_rank, left = divmod(count, degree)
    if schedule.v_shaped:
        wanted, fits = f"{2 * degree}", per_rank == 2
    elif schedule.several_stages:
        wanted, fits = f"a multiple of {degree} from {2 * degree} on", per_rank >= 2
    else:
        wanted, fits = f"{degree}", per_rank == 1
    if left or not fits:
        raise StageError(key, f"{how}; {name} over {degree} ranks takes {wanted}")
    if schedule.v_shaped:
        return tuple(min(stage, 2 * degree - 1 - stage) for stage in range(count))
    return tuple(stage % degree for stage in range(count))


def _short(names: Sequence[str]) -> str:
    """``tok_embeddings, layers.0-3, norm``: runs of numbered names folded."""
    shown: list[str] = []
    run: tuple[str, int, int] | None = None
    for name in [*names, ""]:
        head, _, tail = name.rpartition(".")
        number = int(tail) if head and tail.isdecimal() else None
        if run is not None and (number is None or run[0] != head or run[2] + 1 != number):
            shown.append(f"{run[0]}.{run[1]}" + (f"-{run[2]}" if run[2] > run[1] else ""))
            run = None
        if number is not None:
            run = (head, number if run is None else run[1], number)
        elif name:
            shown.append(name)
    return ", ".join(shown)
