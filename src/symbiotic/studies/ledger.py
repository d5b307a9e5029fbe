"""`ledger.jsonl` of a study: a line for everything that was begun and ended, with the seconds it took.

The study's cost, its failures and its forecast come from here; its results from `results.csv`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from symbiotic.files import read_objects

FILE = "ledger.jsonl"
What = Literal["run", "parent"]
Status = Literal["done", "failed", "interrupted", "stopped", "refused", "over budget"]


@dataclass(frozen=True)
class Entry:
    """
    Args:
        what: `run` or `parent`. status: `interrupted` by a signal; `stopped` by its alarm, `refused` because its config
            or its folder was, and neither of these is tried again. text: why.
    """

    what: What
    run: str
    arm: str
    seed: int
    status: Status
    seconds: float
    text: str = ""


def add(folder: Path, entry: Entry) -> None:
    """One write, so that lines of processes that end together do not mix."""
    folder.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(entry)) + "\n").encode()
    handle = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def read(folder: Path) -> list[Entry]:
    """Lines that cannot be read (a kill in the middle of one) are left out."""
    found = []
    for line in read_objects(folder / FILE):
        with suppress(TypeError):  # of other keys
            found.append(Entry(**line))
    return found


def hours(entries: Sequence[Entry]) -> float:
    """Of all that was made, side by side or not, failures included; a process that was killed leaves no line."""
    return sum(entry.seconds for entry in entries) / 3600


def timed(entries: Sequence[Entry]) -> dict[str, list[tuple[str, float]]]:
    """`run` and `parent` -> (arm, seconds) of those that ended well."""
    found: dict[str, list[tuple[str, float]]] = {"run": [], "parent": []}
    for entry in entries:
        if entry.status == "done":
            found[entry.what].append((entry.arm, entry.seconds))
    return found


def failures(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Run -> its last entry, where that is no success."""
    last = {entry.run: entry for entry in entries if entry.what == "run" or entry.status != "done"}
    return {run: entry for run, entry in last.items() if entry.status != "done"}
