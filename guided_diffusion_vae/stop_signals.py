"""A signal is a request: the loop that asks for it finishes its step, saves and leaves."""

import atexit
import contextlib
import functools
import multiprocessing
import signal
import time

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
ECHO_S = 2.0  # launchers signal a process group and each process in it: that is one request


class StopSignals:
    """Notes a request to stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2); another, two seconds later, leaves at once."""

    def __enter__(self):
        self.signal_name, self.noted, self.previous = "", 0.0, {}
        for name in NAMES:
            with contextlib.suppress(ValueError, AttributeError):  # not in the main thread; not on this system
                self.previous[name] = signal.signal(getattr(signal, name), functools.partial(self._note, name))
        return self

    def _note(self, name, number, frame):
        if not self.signal_name:
            self.signal_name, self.noted = name, time.monotonic()
        elif time.monotonic() - self.noted > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *error):
        for name, handler in self.previous.items():
            signal.signal(getattr(signal, name), handler)


def leave_stopping_to_the_loop(worker: int = 0) -> None:
    """For a process that reads data: a signal that reaches all processes must not end it before the loop has saved."""
    for name in NAMES:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@atexit.register
def _end_readers() -> None:
    """At exit `multiprocessing` sends its daemons SIGTERM, which these ignore, and waits for them for ever."""
    readers = [child for child in multiprocessing.active_children() if child.daemon]
    if readers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take their end for an accident
    for reader in readers:
        reader.kill()
