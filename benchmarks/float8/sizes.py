"""Sizes (M, K, N) of linears that the benchmarks run over."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from trainer.calibration.linears import Shape
from trainer.calibration.shapes import ModelLinears, linears_of
from trainer.config import checks
from trainer.config.errors import ConfigError
from trainer.config.load import load
from trainer.plan.layout import build_layout

LINEARS = (
    Shape(8192, 4096, 4096),
    Shape(8192, 4096, 14336),
    Shape(8192, 14336, 4096),
    Shape(16384, 8192, 28672),
    Shape(8192, 4096, 1024),
    Shape(4096, 4096, 4096),
)
"""Those of Llama 3 8B at 8192 tokens, a large one of 70B, and a square one: docs/performance.md's."""

_POWERS = tuple(2**power for power in range(10, 15))


def read_shape(text: str) -> Shape:
    """``8192,4096,1024``.

    Raises:
        argparse.ArgumentTypeError: it is not three positive integers.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected M,K,N, three positive integers")
    return Shape(*(int(part) for part in parts))


def read_sizes(text: str) -> list[int]:
    """``4096`` or ``1024,4096``.

    Raises:
        argparse.ArgumentTypeError: one is not a positive integer.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected positive integers, separated by commas")
    return [int(part) for part in parts]


def generate(name: str, m: list[int] | None, k: list[int] | None, n: list[int] | None) -> list[Shape]:
    """The shapes of a generator.

    Args:
        name: ``sweep``: all combinations of powers of two; ``pow2``: M = K = N; ``llama``: the linears of
            Llama 3 8B and 70B; ``custom``: all combinations of `m`, `k` and `n`.
        m: Values of M: needed for ``custom``, in place of the generator's own for ``sweep`` and ``llama``.
        k: The same of K, not for ``llama``.
        n: The same of N, not for ``llama``.

    Raises:
        ValueError: sizes are missing, or have no effect.
    """
    given = {"--M": m, "--K": k, "--N": n}
    needless = {"pow2": ("--M", "--K", "--N"), "llama": ("--K", "--N")}.get(name, ())
    idle = [flag for flag in needless if given[flag] is not None]
    if idle:
        raise ValueError(f"{' and '.join(idle)} has no effect with --shape_gen_name {name}")
    if name == "custom":
        missing = [flag for flag, sizes in given.items() if sizes is None]
        if missing:
            raise ValueError(f"--shape_gen_name custom needs {', '.join(missing)}")
    if name == "pow2":
        return [Shape(size, size, size) for size in _POWERS]
    if name == "llama":
        flavors = ("8B", "70B")
        found = [
            row.shape
            for flavor, tokens in itertools.product(flavors, m or [8192])
            for row in model_linears("llama3", flavor, tokens, 1)
        ]
        return list(dict.fromkeys(found))
    return [Shape(*sizes) for sizes in itertools.product(m or _POWERS, k or _POWERS, n or _POWERS)]


def model_linears(model: str, flavor: str, tokens: int, tensor_parallel: int) -> list[ModelLinears]:
    """The distinct linears of a model's flavor, as one rank computes them.

    Raises:
        ConfigError: there is no such model or flavor, or it cannot be split so.
    """
    flags: dict[str, Any] = {
        "model.name": model,
        "model.flavor": flavor,
        "training.local_batch_size": 1,
        "training.seq_len": tokens,
        "parallelism.tensor_parallel_degree": tensor_parallel,
    }
    loaded = load([f"--{key}={value}" for key, value in flags.items()], env={})
    problems = checks.problems(loaded, tensor_parallel)
    if problems:
        raise ConfigError(problems)
    return linears_of(loaded.config, build_layout(loaded.config, tensor_parallel), "cpu")
