"""R6, R7, R8 and R16 of docs/reliability.md: signals, a rank that hangs, workers that are killed."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.faults import Started

STALLS = [
    "--experimental.custom_import=slow_parts",
    "--training.dataset=stalling",
    "--training.seq_len=2048",
    "--training.local_batch_size=4",
    "--training.global_batch_size=8",
]
HERE = {"PYTHONPATH": str(Path(__file__).parent)}
ENDLESS = "--training.steps=1000000"
VALIDATION = ["--validation.enable", "--validation.freq=3", "--validation.seq_len=32"]
VALIDATION += ["--validation.local_batch_size=1"]


def ended_well(run, code, last_seen):
    """The run saved within a step of what was seen when the signal went out, and says so."""
    assert run.finish() == code, run.out[-4000:]
    step, windows = run.newest_checkpoint()
    assert step == (run.steps_logged[-1] if run.steps_logged else 0)
    assert windows == step * windows_per_step(run)
    assert f"stopped after step {step}" in run.out
    return step - last_seen


def windows_per_step(run):
    return 8 if "2,048" in run.out or "sequences of 2048" in run.out else 4


def test_a_stop_and_a_kill_change_nothing(tmp_path):
    """R6 and R8, short: SIGTERM to rank 1 alone, the same command again, and then a worker killed."""
    flags = ["--training.steps=14", "--checkpoint.interval=3"]
    whole = Started(tmp_path, *flags, name="whole")
    assert whole.finish() == 0, whole.out[-3000:]
    run = Started(tmp_path, *flags)
    run.until_step(4)
    run.send(signal.SIGTERM, rank=1)
    assert ended_well(run, 75, last_seen=4) <= 2
    again = Started(tmp_path, *flags, env={"MAX_RESTARTS": "3"})
    again.until_step(10)
    again.send(signal.SIGKILL, rank=1)
    assert again.finish() == 0, again.out[-3000:]
    assert again.out.count("restarting the workers") == 1
    assert again.out.count("resumed from") == 2
    assert again.bits == whole.bits
    report = again.report
    assert report["what"].startswith("rank 1 was ended by SIGKILL")
    assert (report["rank"], report["restarts_left"]) == (1, 3)
    assert report["last_place"].startswith("step ")
    assert report["versions"]["torch"]


def test_ctrl_c_in_a_validation_and_a_second_signal_in_a_save(tmp_path):
    run = Started(tmp_path, ENDLESS, *VALIDATION, ngpu=1, name="validation")
    run.until_step(3)  # its validation takes the whole set, thousands of batches
    time.sleep(0.5)
    run.send(signal.SIGINT)
    assert ended_well(run, 130, last_seen=3) == 0
    assert "validation at 3" not in run.out
    slow = {**HERE, "SLOW_SAVE": "3600"}
    flags = ["--experimental.custom_import=slow_parts", "--checkpoint.interval=2"]
    run = Started(tmp_path, ENDLESS, *flags, ngpu=1, env=slow, name="save")
    run.until(lambda: list((run.folder / "checkpoint").glob("step-2.tmp*")))
    run.send(signal.SIGUSR1)
    time.sleep(1)
    run.send(signal.SIGTERM)
    assert run.finish() == 143
    assert "ended at once by a second signal, SIGTERM: not saved" in run.out
    assert not list((run.folder / "checkpoint").glob("step-2"))


def test_a_rank_that_waits_for_data_lets_the_others_save(tmp_path):
    run = Started(tmp_path, ENDLESS, *STALLS, env={**HERE, "STALL": "1:400"})
    run.until_step(8)
    time.sleep(1)
    run.send(signal.SIGUSR1, rank=0)  # rank 1, which waits, is not told
    assert ended_well(run, 75, last_seen=8) == 0


def stop_a_rank(tmp_path, rank, timeout_seconds):
    """SIGSTOP it; returns the run and the seconds until its end."""
    run = Started(tmp_path, ENDLESS, f"--comm.train_timeout_seconds={timeout_seconds}", name=f"stop{rank}")
    run.until_step(3)
    pid = run.worker(rank)
    stopped = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    assert run.finish() == 6, run.out[-3000:]
    took = time.monotonic() - stopped
    assert f"rank {rank} does not answer" in run.out
    assert "last collective: gloo:all_" in run.out
    assert not psutil.pid_exists(pid)
    return run, took


def test_a_stopped_rank_ends_the_run_and_is_named(tmp_path):
    """R7, without its time, which is measured apart."""
    run, _ = stop_a_rank(tmp_path, 1, 6)
    report = run.report
    assert "rank 1 does not answer" in report["what"]
    assert report["exit_code"] == 6
    assert any("step:  3" in line for line in report["log"])


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_in_time(tmp_path):
    """R7: within the timeout and 10 seconds."""
    late = [stop_a_rank(tmp_path, rank, 15)[1] - 15 for rank in (0, 1)]
    print("seconds after the timeout:", late)
    assert max(late) < 10


@pytest.mark.slow
def test_signals_at_any_moment(tmp_path):
    """R6: three signals, to the launcher or one rank, at random moments, in validations and saves too."""
    dice = random.Random(0)
    late = []
    for number in range(18):
        name = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[number % 3]
        target = (None, 0, 1)[number // 3 % 3]
        flags = [ENDLESS, "--checkpoint.interval=4", *VALIDATION, "--validation.steps=40"]
        run = Started(tmp_path, *flags, name=f"run{number}")
        first = number % 6 == 0
        run.until_line("run folder") if first else run.until_step(dice.randrange(1, 9))
        time.sleep(dice.random())
        seen = run.steps_logged[-1] if not first else 0
        run.send(name, rank=target)
        late.append(ended_well(run, 130 if name == signal.SIGINT else 75, seen))
    print("steps between the last that was seen and the save:", late)
    assert max(late) <= 2  # the step in progress, and one that began before the signal was sent


@pytest.mark.slow
def test_three_kills_and_the_same_end(tmp_path):
    """R8: a worker killed three times; at most one interval lost each, the end equal to the bit."""
    flags = ["--training.steps=40", "--checkpoint.interval=5"]
    whole = Started(tmp_path, *flags, name="whole")
    assert whole.finish() == 0
    run = Started(tmp_path, *flags, env={"MAX_RESTARTS": "3"})
    lost = []
    for kill, step in enumerate((7, 19, 31)):
        run.until(lambda count=kill: run.out.count("run folder:") == count + 1)
        run.until_step(step)
        run.send(signal.SIGKILL, rank=kill % 2)
        reached = run.steps_logged[-1]
        run.until(lambda count=kill: run.out.count("resumed from") == count + 1)
        resumed = int(run.out.rpartition("(step ")[2].partition(",")[0])
        lost.append(reached - resumed)
    assert run.finish() == 0, run.out[-3000:]
    assert run.bits == whole.bits
    print("steps lost:", lost)
    assert max(lost) <= 5 + 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_minutes_with_a_failure_a_minute(tmp_path):
    """R16: the share of time spent on steps that count, between the first step and the last."""
    minutes = float(os.environ.get("FAILURE_MINUTES", "10"))
    flags = [ENDLESS, "--checkpoint.interval_minutes=0.05", "--metrics.log_freq=1"]
    run = Started(tmp_path, *flags, env={"MAX_RESTARTS": "100"})
    run.until_step(2)
    begun, down, lost = time.monotonic(), 0.0, 0
    dice = random.Random(1)
    while time.monotonic() - begun < 60 * minutes:
        time.sleep(60)
        attempts = run.out.count("step: ")
        starts = run.out.count("run folder:")
        run.send(signal.SIGKILL, rank=dice.randrange(2))
        killed = time.monotonic()
        saved = run.newest_checkpoint()[0]
        lost += run.steps_logged[-1] - saved
        run.until(lambda n=starts: run.out.count("run folder:") > n)
        run.until(lambda n=attempts: run.out.count("step: ") > n)
        down += time.monotonic() - killed
    elapsed, steps = time.monotonic() - begun, run.out.count("step: ")
    share = (elapsed - down) / elapsed * (1 - lost / steps)  # steps that were run twice count once
    run.send(signal.SIGTERM)
    assert run.finish() == 75
    print(f"productive share: {100 * share:.1f} %")
    assert share >= 0.85
