import time

import pytest
import torch

from trainer.metrics.meter import PhaseClock, ThroughputMeter

F_8B = 57_914_449_920


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def make_meter(clock, **kwargs):
    return ThroughputMeter(**{"flops_per_token": F_8B, "peak_tflops": 989, "clock": clock, **kwargs})


def test_phases_nest_and_add_up_to_the_wall_time(clock):
    phases = PhaseClock(clock)
    clock.advance(1)
    with phases.phase("validation"):
        clock.advance(2)
        with phases.phase("compile"):
            clock.advance(4)
        clock.advance(8)
    clock.advance(16)
    assert phases.seconds() == {"training": 17, "validation": 10, "compile": 4}


def test_a_phase_closes_when_its_block_fails(clock):
    phases = PhaseClock(clock)

    def fail():
        clock.advance(1)
        raise RuntimeError

    with pytest.raises(RuntimeError), phases.phase("validation"):
        fail()
    phases.leave("compile")  # never entered: nothing happens
    clock.advance(2)
    assert phases.seconds() == {"training": 2, "validation": 1}


def test_the_known_answer(clock):
    meter = make_meter(clock)
    clock.advance(1)
    meter.count_step(7034)
    reading = meter.read()
    assert reading.tps == 7034
    assert f"{reading.tflops:.2f}" == "407.37"
    assert f"{reading.mfu:.2f}" == "41.19"


def test_compile_checkpoint_and_validation_are_outside_tps(clock):
    meter = make_meter(clock)
    for _ in range(4):
        with meter.data_loading():
            clock.advance(0.5)
        clock.advance(1.5)
        meter.count_step(1000)
    meter.phases.enter("compile")
    clock.advance(60)
    meter.phases.leave("compile")
    for name, seconds in (("validation", 7), ("checkpoint", 11)):
        with meter.excluded(name):
            clock.advance(seconds)
    reading = meter.read()
    assert reading.elapsed_seconds == 8
    assert reading.tps == 500
    assert reading.end_to_end_seconds_per_step == 2
    assert reading.data_loading_seconds_per_step == 0.5
    assert reading.data_loading_percent == 25
    assert reading.phase_seconds["compile"] == 60
    assert reading.phase_seconds["validation"] == 7
    assert reading.phase_seconds["checkpoint"] == 11
    # The next reading starts afresh.
    clock.advance(1)
    meter.count_step(100)
    reading = meter.read()
    assert (reading.steps, reading.tokens, reading.tps) == (1, 100, 100)
    assert reading.phase_seconds["validation"] == 0


def test_time_since_steps_were_done_is_the_next_steps(clock):
    meter = make_meter(clock)
    clock.advance(2)
    meter.count_step(400)
    done = meter.close_window()
    meter.count_step(100)
    clock.advance(3)
    assert meter.read(done, seconds_ago=1).elapsed_seconds == 4
    clock.advance(1)
    reading = meter.read()
    assert (reading.tokens, reading.elapsed_seconds) == (100, 2)
    # What does not count in between is no time that they took less.
    meter.count_step(100)
    clock.advance(2)
    done = meter.close_window()
    with meter.phases.phase("compile"):
        clock.advance(60)
    assert meter.read(done, seconds_ago=60).elapsed_seconds == 2


def test_tps_is_per_device(clock):
    # 2 cp * 2 tp * 2 pp devices train the same tokens together.
    meter = make_meter(clock, non_data_parallel_degree=8, peak_tflops=None)
    clock.advance(2)
    meter.count_step(16_000)
    reading = meter.read()
    assert reading.tps == 1000
    assert reading.mfu is None


def test_mean_after_warmup_leaves_the_first_reading_out(clock):
    meter = make_meter(clock)
    assert meter.mean_after_warmup() is None
    clock.advance(10)
    meter.count_step(1000)
    meter.read()
    assert meter.mean_after_warmup() is None
    for _ in range(5):
        clock.advance(1)
        meter.count_step(1000)
    meter.read()
    clock.advance(3)  # a last step that has no line of its own
    meter.count_step(1000)
    mean = meter.mean_after_warmup()
    assert (mean.steps, mean.tokens, mean.elapsed_seconds, mean.tps) == (6, 6000, 8, 750)


def test_queued_work_of_the_device_belongs_to_training(clock):
    queued = [3.0]

    def synchronize():
        clock.advance(queued[0])
        queued[0] = 0.0

    meter = make_meter(clock, synchronize=synchronize)
    clock.advance(1)
    with meter.excluded("validation"):
        queued[0] = 5.0
    reading = meter.read()
    assert reading.elapsed_seconds == 4
    assert reading.phase_seconds["validation"] == 5


def test_a_reading_without_time_or_steps(clock):
    reading = make_meter(clock).read()
    assert (reading.tps, reading.tflops, reading.mfu, reading.end_to_end_seconds_per_step) == (0, 0, 0, 0)


def test_compile_time_is_seen_in_forward_and_backward():
    meter = make_meter(time.perf_counter)
    assert meter.watch_compile()
    torch._dynamo.reset()  # drops the callbacks
    meter.start()  # registers them again, once
    meter.start()
    callbacks = torch._dynamo.callback.callback_handler.start_callbacks
    assert callbacks.count(meter._compile_watch._on_start) == 1
    try:
        function = torch.compile(lambda x: (x.sin() * 2).sum(), backend="aot_eager")
        x = torch.ones(8, requires_grad=True)
        function(x).backward()
        first = meter.read().phase_seconds["compile"]
        function(x).backward()
        second = meter.read().phase_seconds["compile"]
    finally:
        meter.stop()
    assert first > 0
    assert second == 0
    meter.stop()
    function(torch.ones(8, 8))  # compiles again, unwatched
    assert meter.read().phase_seconds["compile"] == 0


def test_stop_after_dynamo_dropped_the_callbacks():
    meter = make_meter(Clock())
    meter.watch_compile()
    torch._dynamo.reset()
    meter.stop()
