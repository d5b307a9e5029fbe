"""Processes that kill themselves right before a line, or a file operation, of their own: every moment in turn.

Random kills hit long work; these hit what is short: the moment between a rename and the next.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from symbiotic.files import PACKAGE

Arm = Callable[[], None]
"""Called in a process that is about to begin: from then on it counts, and at its number it is gone."""

SOURCES = (str(PACKAGE), str(Path(__file__).parent))

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")


def at_line(point: int, names: Collection[str]) -> Arm:
    """Die before the `point`-th line (from 1) that runs in our functions of these names."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_name not in names or not frame.f_code.co_filename.startswith(SOURCES):
            return None
        count += event == "line"
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return lambda: sys.settrace(trace)


def at_file(point: int, parts: Collection[str], number: int = signal.SIGKILL, log: Path | None = None) -> Arm:
    """Get a signal before the `point`-th opening, renaming or removal of a path that has one of these parts. log: a
    file that keeps the count."""
    main, count = os.getpid(), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS or os.getpid() != main or not any(part in str(args[0]) for part in parts):
            return
        count += 1
        if log is not None:
            os.pwrite(descriptor, f"{count:8}".encode(), 0)
        if count == point:
            os.kill(main, number)

    def arm() -> None:
        nonlocal main, descriptor
        main = os.getpid()
        if log is not None:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
        sys.addaudithook(hook)

    descriptor = -1
    return arm


def forked(act: Callable[[], Any], arm: Arm = lambda: None) -> int:
    """The status of a forked process that does it: 0, 1 after an error, or minus the signal that ended it."""
    process = os.fork()
    if not process:
        status = 1
        try:
            arm()
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.settrace(None)
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def every_line(act: Callable[[], Any], names: Collection[str], before: Callable[[], Any] = int) -> Iterator[int]:
    """Point after point: `before()` here, then a process that does `act` and is killed there. It ends with the first
    one that came to its own end."""
    for point in itertools.count(1):
        before()
        status = forked(act, at_line(point, names))
        assert status in (0, -signal.SIGKILL), f"point {point}: status {status}"
        yield point
        if status == 0:
            return
