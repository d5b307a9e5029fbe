"""One process a folder: whoever claims it first holds it until it ends, however it ends. Standard library only."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from symbiotic.schema import RunError

CLAIM = ".claim"
_PR_SET_PDEATHSIG = 1  # of prctl

_held: set[IO[str]] = set()  # of this process, or of the one that it was forked from


class Claimed(RunError):
    """Another process is at work in the folder."""


@contextmanager
def claimed(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder, which is made where it is not there; the claim of a dead process is free.

    what: which work is refused, for the message: "train in this folder".

    Raises:
        Claimed: another process holds it; its id and host are named.
        RunError: it cannot be written.
    """
    path = folder / CLAIM
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{error.filename or path}: cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise Claimed(f"{folder}: {owner} is at work in this folder; wait for it, or stop it, to {what}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            file.truncate(0)


def let_go(*_: Any) -> None:
    """In a forked process that outlives its parent by seconds and writes nothing: do not hold the parent's claims."""
    for file in _held:
        file.close()
    _held.clear()


def serve(*_: Any) -> None:
    """In a worker of a loader: hold no claim, end with the process that it reads for, and leave its end to that one.

    A first SIGTERM to all processes (a service manager, `timeout`) would end the workers, and with them the step that
    is to be finished; the second ends them. torch's watch does not see a parent that died before the worker had begun.
    """
    let_go()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    with suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)


def owner(folder: Path) -> str | None:
    """Who is at work in a folder: `process 12 on HOST`; None where nobody is."""
    try:
        with (folder / CLAIM).open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return (folder / CLAIM).read_text(encoding="utf-8").strip() or "another process"
    return None
