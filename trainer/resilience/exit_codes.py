"""How a run ends, as a number that a scheduler can act on. Torch-free.

0        trained to the end
1        failed; the traceback is on stderr and in crash_report.json
2        bad input: configuration, data, tokenizer
3        the device ran out of memory
4        a checkpoint that is needed cannot be used or written
5        too many bad steps in a row: loss or gradients not finite, or loss spikes
6        a rank hung: the others ended the run
75       asked to stop (SIGTERM, SIGUSR1, SIGHUP, training.max_minutes) and saved: run it again to go on
130      the same after Ctrl-C (SIGINT)
128 + n  ended by signal n with nothing saved: without checkpoints, by a second signal, or from outside
"""

from __future__ import annotations

import signal

EXIT_FAILED = 1
EXIT_OUT_OF_MEMORY = 3
EXIT_BAD_STEPS = 5
EXIT_HUNG = 6
EXIT_STOPPED = 75
"""sysexits.h calls it EX_TEMPFAIL: nothing is wrong, try again."""


def ended_by(number: int) -> int:
    """The code of a process that signal `number` ended, as shells give it."""
    return 128 + number


def stopped_by(number: int | None, saved: bool) -> int:
    """The code of a run that stopped when asked: by signal `number`, or by the clock where it is None."""
    if number == signal.SIGINT or (number is not None and not saved):
        return ended_by(number)
    return EXIT_STOPPED


def exit_code_of(code: int) -> int:
    """A process's return code as the shell has it: negative ones are of signals."""
    return ended_by(-code) if code < 0 else code
