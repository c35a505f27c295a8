"""Mixtures of datasets: what a user writes, and which source a window comes from. Torch-free.

An entry is ``NAME[:PATH][#FIELD]=WEIGHT``: a row of `DATASETS`, its path, the field that holds the text
where it is not ``training.text_field``, and a share of the windows. Weights need not add up to 1.

Window n of the run comes from ``Schedule.source(n)``, a pure function of (weights, seed, n). The shares are
laid out evenly over a period of `PERIOD` windows and then shuffled within `BLOCK` windows by (seed, block),
so that the counts keep close to the weights everywhere, yet no rank always gets the same source.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

PERIOD = 4096
BLOCK = 64


@dataclass(frozen=True)
class Entry:
    """One source of a mixture."""

    dataset: str
    path: str | None
    text_field: str | None
    weight: float

    @property
    def label(self) -> str:
        """The source as a user knows it."""
        return f"{self.dataset}:{self.path}" if self.path else self.dataset


def parse_mixture(entries: Sequence[str]) -> list[Entry]:
    """Read the entries of ``training.mixture``.

    Raises:
        ValueError: An entry is malformed, or a weight is too small for the period.
    """
    found = [_parse(text) for text in entries]
    _counts([entry.weight for entry in found])
    return found


def _parse(text: str) -> Entry:
    rest, equals, weight_text = text.rpartition("=")
    try:
        weight = float(weight_text)
    except ValueError:
        weight = math.nan
    source, _, text_field = rest.partition("#")
    dataset, _, path = source.partition(":")
    if not equals or not dataset or not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"got {text!r}\n"
            "  allowed: NAME[:PATH][#FIELD]=WEIGHT with a weight above 0\n"
            "  as in text_files:/data/web/*.jsonl.gz#content=0.7"
        )
    return Entry(dataset, path or None, text_field or None, weight)


def _counts(weights: Sequence[float]) -> list[int]:
    """Windows of each source in a period: the largest remainders are rounded up."""
    total = math.fsum(weights)
    shares = [weight / total * PERIOD for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: PERIOD - sum(counts)]:
        counts[i] += 1
    if min(counts, default=1) == 0:
        small = counts.index(0)
        raise ValueError(
            f"the weight {weights[small]:g} is {weights[small] / total:.2g} of the whole\n"
            f"  allowed: at least 1/{PERIOD} of it; leave the source out, or give it more"
        )
    return counts


class Schedule:
    """Which source each window of the run comes from."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._seed = seed
        self._pattern = _even(_counts(weights))
        self._block = lru_cache(maxsize=2)(self._shuffled)

    def source(self, window: int) -> int:
        """Index of the source of window ``window``."""
        return self._block(window // BLOCK)[window % BLOCK]

    def _shuffled(self, block: int) -> list[int]:
        start = block * BLOCK % PERIOD
        sources = self._pattern[start : start + BLOCK]
        random.Random(f"octavo/mixture/{self._seed}/{block}").shuffle(sources)
        return sources


def _even(counts: Sequence[int]) -> list[int]:
    """Each source ``counts[i]`` times, as evenly as can be: the one that is furthest behind comes next."""
    pattern: list[int] = []
    given = [0] * len(counts)
    for place in range(1, sum(counts) + 1):
        behind = [count * place / PERIOD - done for count, done in zip(counts, given, strict=True)]
        behind = [
            gap if done < count else -math.inf for gap, count, done in zip(behind, counts, given, strict=True)
        ]
        chosen = behind.index(max(behind))
        given[chosen] += 1
        pattern.append(chosen)
    return pattern
