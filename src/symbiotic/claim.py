"""One process a folder: whoever claims it first holds it until it ends, however it ends. Standard library only."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from symbiotic.schema import RunError

CLAIM = ".claim"

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
