"""Signals and clocks: what one process counts, when a run stops, what it leaves."""

import signal
import subprocess
import sys
from collections import Counter

import pytest

from trainer.resilience import signals as signals_module
from trainer.resilience.agent import _may_not_happen_again
from trainer.resilience.exit_codes import exit_code_of, stopped_by
from trainer.resilience.notes import STARTED_VARIABLE
from trainer.resilience.signals import FORWARDED, SignalWatch
from trainer.resilience.stopping import Stopping

WAITS = """
import os, sys, time
from trainer.resilience.signals import SignalWatch
watch = SignalWatch("[rank 0] ").install()
print("ready", flush=True)
while watch.requested is None:
    time.sleep(0.01)
print("asked", int(watch.requested), flush=True)
time.sleep(600)
"""


def waiting_process():
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("first", [signal.SIGTERM, FORWARDED[signal.SIGTERM]])
def test_a_second_signal_ends_the_process_and_the_forwarded_first_does_not(first):
    """A scheduler signals worker and launcher, which forwards: that is one request, not two."""
    other = {signal.SIGTERM: FORWARDED[signal.SIGTERM]}.get(first, signal.SIGTERM)
    process = waiting_process()
    process.send_signal(first)
    assert process.stdout.readline() == b"asked 15\n"
    process.send_signal(other)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 128 + signal.SIGUSR1
    assert b"[rank 0] ended at once by a second signal, SIGUSR1" in process.stderr.read()


def test_each_signal_is_forwarded_under_a_number_of_its_own():
    assert len({*FORWARDED.values(), *FORWARDED}) == 8
    assert [signals_module.signal_name(n) for n in (9, FORWARDED[signal.SIGINT])] == ["SIGKILL", "SIGINT"]


def test_exit_codes():
    assert stopped_by(signal.SIGTERM, saved=True) == stopped_by(signal.SIGUSR1, saved=True) == 75
    assert stopped_by(None, saved=True) == stopped_by(None, saved=False) == 75
    assert stopped_by(signal.SIGINT, saved=True) == 130
    assert stopped_by(signal.SIGTERM, saved=False) == 143
    assert [exit_code_of(code) for code in (0, 4, -9)] == [0, 4, 137]


def test_only_what_may_not_happen_again_is_started_again():
    codes = [1, 2, 3, 4, 5, 6, 143, -9, -11]
    assert [code for code in codes if _may_not_happen_again(code)] == [1, 6, -9, -11]


class Clock:
    """Seconds that pass when told, and `step` more at each look."""

    def __init__(self, step=0.0):
        self.now, self.step = 1000.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_a_run_stops_early_enough_for_a_step_and_a_save(monkeypatch):
    monkeypatch.delenv(STARTED_VARIABLE, raising=False)
    clock = Clock()
    stopping = Stopping(None, max_minutes=10, clock=clock)
    assert not stopping.agreed()
    clock.now += 200  # compile: not typical of a step
    assert not stopping.agreed()
    clock.now += 50
    assert not stopping.agreed()
    clock.now += 40
    stopping.saved(40)
    assert not stopping.agreed()  # 290 of 600 s, a step of 50 and a save of 40 to come
    clock.now += 50
    assert not stopping.agreed()
    clock.now = 1000.0 + 511
    assert stopping.agreed()
    assert stopping.stop.signal is None
    assert str(stopping.stop) == "training.max_minutes is over"


def test_the_limit_counts_from_the_launcher_over_restarts(monkeypatch):
    clock = Clock()
    monkeypatch.setenv(STARTED_VARIABLE, str(clock.now - 601))
    assert Stopping(None, max_minutes=10, clock=clock).agreed()
    assert not Stopping(None, max_minutes=11, clock=clock).agreed()


def test_a_save_is_due_by_the_clock():
    clock = Clock()
    stopping = Stopping(None, interval_minutes=2, clock=clock)
    due = []
    for _ in range(10):
        stopping.agreed()
        due.append(stopping.save_due)
        clock.now += 30
        if stopping.save_due:
            stopping.saved(1.0)
    assert due == ([False] * 4 + [True]) * 2


def test_a_run_saves_by_the_clock_and_before_its_limit(prepare, monkeypatch):
    """Each look at the clock takes 6 seconds, so 12 pass between the starts of two steps."""
    flags = ("--checkpoint.enable", "--checkpoint.interval_minutes=1", "--training.max_minutes=4")
    run = prepare(*flags, "--training.steps=1000")
    stopping = run.trainer.faults.stopping
    clock = Clock(step=6.0)
    stopping._clock, stopping._last_save, stopping._deadline = clock, clock.now, clock.now + 240
    run.train()
    steps = sorted(int(path.name[5:]) for path in (run.folder / "checkpoint").glob("step-*"))
    assert steps[-1] == run.trainer.step
    assert 8 < run.trainer.step < 24
    assert len(steps) >= 3
    assert run.trainer.faults.exit_code == 75
    assert "training.max_minutes is over; run it again to go on (exit code 75)" in run.log
    assert clock.now <= 1000 + 240 + 12


class Asked(SignalWatch):
    """A request that comes when the trainer is at a step."""

    def __init__(self, number, step):
        super().__init__()
        self.trainer, self._number, self._step = None, number, step

    @property
    def requested(self):
        return self._number if self.trainer and self.trainer.step >= self._step else None


@pytest.mark.parametrize(
    ("flags", "saved", "code", "word"),
    [
        (("--checkpoint.enable",), ["step-3"], 75, "run it again to go on"),
        ((), [], 143, "nothing was saved"),
        (("--checkpoint.enable", "--checkpoint.load_only"), [], 143, "nothing was saved"),
        (("--checkpoint.enable", "--checkpoint.async_mode=async"), ["step-3"], 75, "run it again to go on"),
    ],
    ids=["saves", "no checkpoints", "load only", "async"],
)
def test_what_a_request_leaves(prepare, flags, saved, code, word):
    asked = Asked(signal.SIGTERM, 3)
    run = prepare(*flags, signals=asked)
    asked.trainer = run.trainer
    run.train()
    assert run.trainer.step == 3
    assert [path.name for path in (run.folder / "checkpoint").glob("step-*")] == saved
    assert run.trainer.faults.exit_code == code
    assert word in run.log
    assert run.trainer.data.windows == 3 * 4  # the batch that was fetched for step 4 is given back


def test_a_request_before_step_1_takes_that_step_where_it_can_save(prepare):
    asked = Asked(signal.SIGTERM, 0)
    run = prepare("--checkpoint.enable", signals=asked)
    asked.trainer = run.trainer
    run.train()
    assert [path.name for path in (run.folder / "checkpoint").glob("step-*")] == ["step-1"]
    again = prepare("--checkpoint.enable", signals=(asked := Asked(signal.SIGTERM, 0)))
    asked.trainer = again.trainer
    again.train()
    assert again.trainer.step == 1  # nothing new to save: it leaves at once
    assert again.trainer.faults.exit_code == 75


def test_a_validation_is_given_up(prepare):
    asked = Asked(signal.SIGINT, 2)
    flags = ("--validation.enable", "--validation.freq=2", "--validation.seq_len=32")
    run = prepare("--checkpoint.enable", *flags, "--validation.local_batch_size=2", signals=asked)
    asked.trainer = run.trainer
    run.trainer.validate = lambda original=run.trainer.validate: run.trainer.step == 2 and original()
    run.train()
    assert run.trainer.step == 2
    assert run.trainer.faults.exit_code == 130
    assert "validation at" not in run.log
    assert run.trainer.model.training


def test_a_direct_and_a_forwarded_signal_are_one_request():
    watch = SignalWatch()
    watch._count(signal.SIGTERM)
    watch._count(FORWARDED[signal.SIGTERM])
    assert watch.requested == signal.SIGTERM
    assert (watch._direct, watch._forwarded) == (Counter({15: 1}), Counter({15: 1}))
