import io
import re

import pytest

from trainer.metrics.step_line import (
    Progress,
    format_seconds,
    format_step_line,
    format_validation_line,
    use_colors,
)

VALUES = {
    "step": 10,
    "loss": 7.624713,
    "grad_norm": 1.41429,
    "memory_gib": 0.9412,
    "memory_percent": 1.1876,
    "tps": 7033.6,
    "tflops": 407.3702,
    "mfu": 41.1901,
}
# What people's scripts look for.
PARSER = re.compile(r"step:\s*(\d+).*memory:\s*([\d.]+)GiB.*tps:\s*([\d,]+)")


def test_step_line_to_the_letter():
    assert format_step_line(**VALUES) == (
        "step: 10  loss:  7.62471  grad_norm:  1.4143  memory:  0.94GiB(1.19%)  "
        "tps: 7,034  tflops: 407.37  mfu: 41.19%"
    )


def test_step_line_of_an_unknown_device_and_large_numbers():
    values = {**VALUES, "step": 1, "mfu": None, "tps": 1_234_567.0, "tflops": 1234.5, "loss": 12.3456789}
    assert format_step_line(**values) == (
        "step:  1  loss: 12.34568  grad_norm:  1.4143  memory:  0.94GiB(1.19%)  "
        "tps: 1,234,567  tflops: 1,234.50  mfu: n/a"
    )


def test_step_line_of_a_loss_that_is_not_finite():
    line = format_step_line(**{**VALUES, "loss": float("nan"), "grad_norm": float("inf")})
    assert "loss:      nan  grad_norm:     inf  memory:" in line


def test_colors_leave_the_text_as_it_is():
    plain, colored = format_step_line(**VALUES), format_step_line(**VALUES, color=True)
    assert colored != plain
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain


def test_only_the_step_line_reads_like_one():
    assert PARSER.search(format_step_line(**VALUES)).groups() == ("10", "0.94", "7,034")
    line = format_validation_line(step=20, loss=5.4321, seconds=3.21)
    assert line == "validation at 20  loss  5.43210  (3.2s)"
    for word in ("step:", "memory:", "tps:"):
        assert word not in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colors_on_a_terminal_only(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert use_colors(Terminal())
    assert not use_colors(Terminal(), disabled=True)
    assert not use_colors(io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert use_colors(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colors(Terminal())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (59.9, "59.9s"),
        (59.96, "1m 00s"),
        (72, "1m 12s"),
        (3599.7, "1h 00m"),
        (11_100, "3h 05m"),
        (187_200, "2d 04h"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_progress_once_a_tenth_of_the_run():
    now = [0.0]
    progress = Progress(200, min_seconds=0, clock=lambda: now[0])
    hints = {}
    for step in [1, *range(5, 201, 5)]:
        now[0] = 30 + 0.5 * step  # 30 s of start-up, then half a second a step
        if hint := progress.hint(step):
            hints[step] = hint
    assert list(hints) == list(range(20, 200, 20))
    assert hints[40] == "progress: 40 of 200 (20 %), 1m 20s left"


def test_progress_is_quiet_in_a_short_run():
    now = [0.0]
    progress = Progress(40, min_seconds=15, clock=lambda: now[0])
    for step in range(1, 41):
        now[0] = 0.3 * step
        assert progress.hint(step) is None


def test_progress_of_a_resumed_run_counts_its_own_steps():
    now = [100.0]
    progress = Progress(200, min_seconds=0, clock=lambda: now[0])
    assert progress.hint(110) is None
    now[0] = 110.0
    assert progress.hint(120) == "progress: 120 of 200 (60 %), 1m 20s left"
