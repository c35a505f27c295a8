"""`octavo selftest resume [--section.key VALUE ...]`: does a killed run resume exactly here, so configured?

Three acts, by launches like ./run_train.sh's, with the flags given and CONFIG_FILE and NGPU as ever:

    1  a run of a few steps that nothing disturbs
    2  the same run, killed with SIGKILL at random moments and started again as often
    3  compared: losses, gradient norms, final checkpoint (weights, moments, converters)

Everything is compared to the bit. On GPUs both runs are in deterministic mode: without it, two undisturbed
runs differ too.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.folders import step_folder
from trainer.checkpoint.integrity import verify
from trainer.commands.checkpoint import print_table
from trainer.config.errors import EXIT_BAD_INPUT, ConfigError
from trainer.config.load import Loaded
from trainer.launch import processes, visible_gpus
from trainer.metrics.history import read_history
from trainer.metrics.sinks import METRICS_FILE

EXIT_DIFFERS = 1
_LOGGED = re.compile(rb'"step": (\d+),')
_RESUMED = re.compile(r"resumed from \S*step-(\d+)")


@dataclass
class Selftest:
    """What is tested, and what came of it so far."""

    flags: list[str]
    """Of both runs, without their folder."""
    steps: int
    kills: int
    folder: Path
    dice: random.Random
    step_seconds: float = 0.0
    log: list[str] = field(default_factory=list)

    def start(self, name: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Launch a run in the folder `name`; returns it and the file that has its output."""
        output = self.folder / f"{name}-{len(self.log)}.log"
        self.log.append(output.name)
        command = [sys.executable, "-m", "trainer.launch", *self.flags]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, f"--job.dump_folder={self.folder / name}"], stdout=file, stderr=subprocess.STDOUT
            )
        return process, output


class RunFailed(Exception):  # noqa: N818
    """A run ended by itself with an error."""

    def __init__(self, code: int, output: Path) -> None:
        lines = output.read_text(errors="replace").splitlines()[-12:]
        super().__init__("\n".join([f"a run ended with exit code {code}: {output}", *lines]))
        self.code = code


def main(argv: Sequence[str]) -> int:
    """Entry point; returns 0 where everything is identical, 1 where not, else a run's own exit code."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help") or words[0] != "resume":
        print(f"usage: octavo selftest resume [options] [--section.key VALUE ...]\n\n{__doc__}")
        return 0 if words and words[0] in ("-h", "--help") else EXIT_BAD_INPUT
    parser = argparse.ArgumentParser("octavo selftest resume", allow_abbrev=False, epilog=_EPILOG)
    parser.add_argument("--steps", type=int, default=20, help="of each run (20)")
    parser.add_argument("--kills", type=int, default=2, help="how often the second run is killed (2)")
    parser.add_argument("--interval", type=int, default=0, help="steps between saves (a fifth of the steps)")
    parser.add_argument("--keep", action="store_true", help="keep both runs, also where they are identical")
    options, flags = parser.parse_known_args(words[1:])
    if not 1 <= options.kills <= (options.steps - 2) // 2 or options.interval < 0:
        message = "allowed: 1 kill and more, and at least two steps for each kill and two beside"
        print(f"error: --kills={options.kills}, --steps={options.steps}; {message}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        test = _prepare(flags, options)
        identical = _resume(test)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    if identical and not options.keep:
        shutil.rmtree(test.folder)
    else:
        print(f"both runs are in {test.folder}")
    return 0 if identical else EXIT_DIFFERS


_EPILOG = "All other flags are those of training: ./run_train.sh --help lists them."


def _prepare(flags: list[str], options: argparse.Namespace) -> Selftest:
    """Check the configuration as a run does, and add what both runs need."""
    from trainer.config.preflight import preflight

    loaded = preflight(flags, world_size=processes(os.environ))
    dump_folder = Path(loaded.config.job.dump_folder)
    dump_folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="selftest-resume-", dir=dump_folder))
    interval = options.interval or max(1, options.steps // 5)
    own = _own_flags(loaded, options.steps, interval)
    return Selftest([*flags, *own], options.steps, options.kills, folder.resolve(), random.Random())


def _own_flags(loaded: Loaded, steps: int, interval: int) -> list[str]:
    config = loaded.config
    seed = config.debug.seed if config.debug.seed is not None else random.randrange(2**31)
    own = [
        f"--training.steps={steps}",
        # The learning rates of the real run's first steps.
        f"--lr_scheduler.total_steps={config.lr_scheduler.total_steps or config.training.steps}",
        f"--debug.seed={seed}",
        "--metrics.log_freq=1",
        "--no-metrics.enable_wandb",
        "--no-metrics.enable_tensorboard",
        "--no-profiling.enable_profiling",
        "--no-profiling.enable_memory_snapshot",
        "--checkpoint.enable",
        "--checkpoint.folder=checkpoint",
        f"--checkpoint.interval={interval}",
        "--checkpoint.keep_latest_k=2",
        "--checkpoint.load_step=-1",
        "--no-checkpoint.load_only",
        "--no-checkpoint.create_seed_checkpoint",
        "--no-checkpoint.last_save_model_only",
    ]
    return [*own, "--debug.deterministic"] if visible_gpus(os.environ) else own


def _resume(test: Selftest) -> bool:
    print(f"1  {test.steps} steps that nothing disturbs")
    started = time.monotonic()
    process, output = test.start("unbroken")
    _wait(process, output)
    test.step_seconds = _step_seconds(test)
    print(f"   done in {time.monotonic() - started:.0f} s, {test.step_seconds:.2f} s a step with its save")
    print(f"2  the same, killed {test.kills} {'time' if test.kills == 1 else 'times'}")
    span = (test.steps - 2) // test.kills
    for number in range(test.kills):
        step = number * span + test.dice.randrange(2 if number == 0 else 1, span + 1)
        process, output = test.start("broken")
        if not _kill_after(test, process, output, step):
            print(f"   start {number + 1}: ended before it could be killed")
            continue
        print(f"   start {number + 1}: {_came_from(output)}, killed after step {step} was logged")
    process, output = test.start("broken")
    _wait(process, output)
    print(f"   start {test.kills + 1}: {_came_from(output)}, ran to the end")
    print("3  compared")
    return _compare(test)


def _wait(process: subprocess.Popen[bytes], output: Path) -> None:
    code = process.wait()
    if code:
        raise RunFailed(code, output)


def _kill_after(test: Selftest, process: subprocess.Popen[bytes], output: Path, step: int) -> bool:
    """SIGKILL launcher and workers at a random moment after `step`, or what is next; False where it ended."""
    import psutil

    path = test.folder / "broken" / METRICS_FILE
    before = path.stat().st_size if path.exists() else 0
    while process.poll() is None:
        if path.exists() and _newest_step(path, before) >= step:
            time.sleep(test.dice.random() * test.step_seconds)
            launcher = psutil.Process(process.pid)
            for victim in [launcher, *launcher.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
            process.wait()
            return True
        time.sleep(0.005)
    _wait(process, output)
    return False


def _newest_step(path: Path, start: int) -> int:
    """The last step that was logged beyond byte `start`, 0 where none was."""
    with path.open("rb") as file:
        file.seek(start)
        steps = [int(step) for step in _LOGGED.findall(file.read())]
    return max(steps, default=0)


def _step_seconds(test: Selftest) -> float:
    """What a step and a save take, by the undisturbed run's own clock."""
    rows = read_history(test.folder / "unbroken").rows[1:]
    return statistics.fmean(row["time_end_to_end"] + row["time_checkpoint"] for row in rows)


def _came_from(output: Path) -> str:
    found = _RESUMED.search(output.read_text(errors="replace"))
    return f"resumed from step-{found.group(1)}" if found else "began with fresh weights"


def _compare(test: Selftest) -> bool:
    whole, broken = (read_history(test.folder / name) for name in ("unbroken", "broken"))
    rows, identical = [("what", "compared", "identical", "first difference")], True
    for key in ("loss", "grad_norm"):
        steps, left = whole.curve(key)
        there, right = broken.curve(key)
        pairs = {step: float(value).hex() for step, value in zip(there, right, strict=True)}
        wrong = [s for s, value in zip(steps, left, strict=True) if pairs.get(s) != float(value).hex()]
        first = f"step {wrong[0]}" if wrong else "none"
        rows.append((key, f"{len(steps)} steps", str(len(steps) - len(wrong)), first))
        identical &= not wrong and len(steps) == test.steps
    places = [step_folder(test.folder / name / "checkpoint", test.steps) for name in ("unbroken", "broken")]
    try:
        states = [verify(place) for place in places]
    except CheckpointError as error:
        rows.append(("final state", "no checkpoint", "0", str(error)))
        identical = False
    else:
        mine, other = ({k: r for k, r in files.items() if k.startswith("rank-")} for files in states)
        differing = sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))
        which = _first_tensor(*(Path(str(place)) / differing[0] for place in places)) if differing else "none"
        rows.append(("final state", f"{len(mine)} files", str(len(mine) - len(differing)), which))
        identical &= not differing
    print_table(rows)
    print("identical: a killed run resumes exactly here" if identical else "NOT identical")
    return identical


def _first_tensor(one: Path, other: Path) -> str:
    """The first tensor of two files of a checkpoint that is not the same."""
    import torch
    from safetensors import safe_open

    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        names = sorted(left.keys())
        if names != sorted(right.keys()):
            return f"{one.name}: other tensors"
        for name in names:
            mine, its = (file.get_tensor(name).reshape(-1).view(torch.uint8) for file in (left, right))
            if not torch.equal(mine, its):
                return name
    return one.name
