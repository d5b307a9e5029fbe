"""Signals that end a run: after the step that it is at where it trains, at once elsewhere. Standard library only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a cluster sends some time before it ends a job."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run. status: of the process, 128 and the number of the signal (130, 143, 138, 140)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


def at_once(number: int) -> None:
    raise Stopped(number)


def handle(act: Callable[[int], None]) -> None:
    """From now on the signals call `act(number)`. Only the main thread of a process can say so: elsewhere nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda got, frame: act(got))


@contextmanager
def handled(act: Callable[[int], None]) -> Iterator[None]:
    """Inside, the signals call `act(number)`."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handle(act)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
