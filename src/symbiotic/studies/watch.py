"""What someone who watches a study sees: a live table of its arms and seeds, or a line for every run that ended."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from symbiotic.callbacks.progress import duration
from symbiotic.claim import owner
from symbiotic.evaluation.names import metric
from symbiotic.studies import console, ledger, results_file
from symbiotic.studies.member import OUTPUT
from symbiotic.studies.plan import Cell, forecast

STEP = re.compile(r"^(stage 0|joint) +(\d+)/(\d+)", re.MULTILINE)
TAIL = 4096


def states(cells: Sequence[Cell], folder: Path, score: str) -> dict[str, str]:
    """Run -> its score, what it is at (`joint 120/450`), why it is not there, or –."""
    rows = {row["run"]: row for row in results_file.read_rows(folder / results_file.FILE)}
    failed = ledger.failures(ledger.read(folder))
    return {cell.run: state(cell, rows.get(cell.run), failed, score) for cell in cells}


def state(cell: Cell, row: Mapping[str, str] | None, failed: Mapping[str, ledger.Entry], score: str) -> str:
    if row is not None:
        value = row.get(f"scores:{score}", "")
        return f"{float(value):.{metric(score).digits}f}" if value else "done"
    if owner(cell.folder) is not None:
        return at(cell.folder / OUTPUT)
    return failed[cell.run].status if cell.run in failed else console.NONE


def at(output: Path) -> str:
    """The step of a run that is being made, from the end of what it prints."""
    try:
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - TAIL))
            found = STEP.findall(file.read().decode(errors="replace"))
    except OSError:
        return "…"
    return "{} {}/{}".format(*found[-1]) if found else "…"


def table(cells: Sequence[Cell], found: Mapping[str, str], score: str) -> Any:
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    named = {(cell.arm, cell.seed): cell.run for cell in cells}
    arms = dict.fromkeys(cell.arm for cell in cells)
    rows = [[arm, *(found[named[arm, seed]] for seed in seeds)] for arm in arms]
    return console.make_table(metric(score).title, ["arm", *(f"seed {seed}" for seed in seeds)], rows)


def line(cells: Sequence[Cell], folder: Path, processes: int | None) -> str:
    """`12 of 36 runs, 2 at work, 1.3 hours so far; about 40 min left`."""
    have = {row["run"] for row in results_file.read_rows(folder / results_file.FILE)}
    left = [cell for cell in cells if cell.run not in have]
    at_work = sum(owner(cell.folder) is not None for cell in left)
    entries = ledger.read(folder)
    text = f"{len(cells) - len(left)} of {len(cells)} runs, {at_work} at work, {ledger.hours(entries):.2f} hours so far"
    wall = forecast(left, 0, processes, ledger.timed(entries)).wall
    return text + (f"; about {duration(wall)} left" if wall else "")


@dataclass(frozen=True)
class Watch:
    """A study as it is seen from its files, since its runs may be made by any process.

    score: shown for runs that ended. processes: that run side by side, for the time that is left.
    """

    cells: Sequence[Cell]
    folder: Path
    score: str
    processes: int | None = 1

    def table(self) -> Any:
        return table(self.cells, states(self.cells, self.folder, self.score), self.score)

    def line(self) -> str:
        return line(self.cells, self.folder, self.processes)

    @contextlib.contextmanager
    def shown(self, every: float = 2.0) -> Iterator[None]:
        """A thread looks at the files every so many seconds: a live table on a terminal, else a line a run."""
        out, stop = Console(file=sys.stdout), threading.Event()
        watch = self._live if out.is_terminal else self._plain
        thread = threading.Thread(target=watch, args=(out, stop, every), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _live(self, out: Console, stop: threading.Event, every: float) -> None:
        def picture() -> Group:
            return Group(self.table(), Text(self.line()))

        with Live(picture(), console=out, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as display:
            while not stop.wait(every):
                display.update(picture(), refresh=True)
            display.update(picture(), refresh=True)

    def _plain(self, out: Console, stop: threading.Event, every: float) -> None:
        told, ended = len(ledger.read(self.folder)), False
        while not ended:
            ended = stop.wait(every)
            entries = ledger.read(self.folder)
            for entry in entries[told:]:
                why = f": {entry.text}" if entry.text else ""
                what = f"{entry.what} of {entry.arm}, seed {entry.seed}: {entry.status}{why}"
                out.print(f"{what} ({duration(entry.seconds)}); {self.line()}", highlight=False, soft_wrap=True)
            told = len(entries)
