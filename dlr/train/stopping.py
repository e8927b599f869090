"""Asked to end: a scheduler's signal lets the step in progress end, which is saved.

Trainer's own way (`enable_jit_checkpoint`) waits for three seconds and then saves within a step,
when random numbers of that step are drawn already: a training that goes on from there is another.
"""

import contextlib
import signal
import threading
from collections.abc import Callable

EXIT = 75            # of a process that was asked to end and can go on: EX_TEMPFAIL of sysexits.h
# Schedulers send the first before they kill, and the others ahead of that where they are told to.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2")
           if hasattr(signal, name)]


class Stopped(Exception):
    """This process was asked to end, and what it has done is saved."""


class _Answer:
    """A handler of this file: one may take the place of another."""

    def __init__(self, call: Callable):
        self.call = call

    def __call__(self, number, frame):
        self.call()


@contextlib.contextmanager
def heeding(call: Callable):
    """Calls `call()` for the duration where this process is asked to end.

    A signal that somebody else heeds, as submitit does, stays theirs. Outside the main thread
    nothing is heeded: Python has signals arrive there.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in SIGNALS
                  if (handler := signal.getsignal(number)) is signal.SIG_DFL
                  or isinstance(handler, _Answer)}
    for number in before:
        signal.signal(number, _Answer(call))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
