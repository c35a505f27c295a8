"""What a checkpoint's checksum costs: saves with it and without it, in turns, and the load's verification.

    python benchmarks/checkpoint_cost.py FOLDER [--gigabytes 3] [--repeats 7] [--busy 1]

FOLDER lies on the disk in question and is left empty. The state is one of a Llama of 2048 dims: fp32 weights
and two moments. A save ends with fsync of every file, so the page cache does not flatter it. Saves with and
without alternate in random order, so that a disk that slows down slows both. ``--busy N`` runs N processes
beside it that compute without pause.

A disk varies from save to save by more than the checksum costs. What does not depend on that is the time
for which a save waits for its checksum, which another thread computes: it is printed too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from trainer.checkpoint import writer
from trainer.checkpoint.folders import step_folder
from trainer.checkpoint.integrity import new_checksum, verify
from trainer.checkpoint.manifest import FULL, Manifest
from trainer.checkpoint.ranks import Ranks


class NoChecksum:
    """In place of a checksum, where its cost is measured."""

    def update(self, block: memoryview) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """A checksum of no one."""
        return "0" * 16


class Watched(ThreadPoolExecutor):
    """Counts how long the save waits for its checksums."""

    waited = 0.0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """As ever, with a clock around the wait for the result."""
        future = super().submit(*args, **kwargs)
        result = future.result

        def timed() -> Any:
            started = time.perf_counter()
            value = result()
            Watched.waited += time.perf_counter() - started
            return value

        future.result = timed  # type: ignore[method-assign, assignment]
        return future


def some_state(gigabytes: float) -> dict[str, torch.Tensor]:
    """Blocks of a transformer and their moments, until the size is reached."""
    shapes = [(2048, 2048)] * 4 + [(5632, 2048)] * 3 + [(2048,)] * 2
    state: dict[str, torch.Tensor] = {}
    block = 0
    while sum(t.nbytes for t in state.values()) < gigabytes * 1e9:
        for part in ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq"):
            for index, shape in enumerate(shapes):
                state[part.format(f"layers.{block}.w{index}")] = torch.randn(shape)
        block += 1
    return state


def save(folder: Path, state: dict[str, torch.Tensor], *, checksum: bool) -> tuple[float, float]:
    """Seconds of one save, and how many of them it waited for its checksum."""
    ranks, manifest = Ranks(), Manifest(1, FULL)
    plan = writer.make_plan(state, None, ranks)
    patch = mock.patch.object(writer, "new_checksum", new_checksum if checksum else NoChecksum)
    Watched.waited = 0.0
    started = time.perf_counter()
    with patch, mock.patch.object(writer, "ThreadPoolExecutor", Watched):
        writer.write_checkpoint(
            step_folder(folder, 1),
            plan,
            lambda box: writer.to_host(writer.local_data(state, box), box),
            manifest,
            ranks,
        )
    return time.perf_counter() - started, Watched.waited


def work_without_pause() -> None:
    """Keep a core busy."""
    while True:
        sum(range(10_000))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--busy", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = some_state(options.gigabytes)
    size = sum(t.nbytes for t in state.values())
    others = [multiprocessing.Process(target=work_without_pause, daemon=True) for _ in range(options.busy)]
    for other in others:
        other.start()
    walls: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    verifying = []
    turns = [True, False] * options.repeats
    random.Random(0).shuffle(turns)
    root = options.folder / "checkpoint-cost"
    save(root, state, checksum=True)  # warms up: page cache, the allocator
    shutil.rmtree(root)
    for checksum in turns:
        wall, waited = save(root, state, checksum=checksum)
        walls[checksum].append(wall)
        if checksum:
            shares.append(100 * waited / wall)
            started = time.perf_counter()
            verify(step_folder(root, 1))
            verifying.append(time.perf_counter() - started)
        shutil.rmtree(root)
    for other in others:
        other.kill()
    started, sums = time.perf_counter(), new_checksum()
    for tensor in state.values():
        sums.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    alone = size / (time.perf_counter() - started) / 1e9
    print(f"{size / 1e9:.2f} GB, {options.repeats} saves each, {options.busy} busy processes beside")
    for name, pick in (("best", min), ("median", statistics.median)):
        with_it, without = pick(walls[True]), pick(walls[False])
        print(
            f"  {name:<6}  with {with_it:6.2f} s ({size / with_it / 1e9:.2f} GB/s)   without {without:6.2f} s"
            f"   {100 * (with_it / without - 1):+.1f} %"
        )
    print(
        f"  waited for the checksum: {statistics.median(shares):.2f} % of a save (median; at most"
        f" {max(shares):.2f} %); the checksum alone: {alone:.1f} GB/s"
    )
    print(
        f"  verifying on load: {statistics.median(verifying):.2f} s (median; the files are in the page cache)"
    )


if __name__ == "__main__":
    main()
