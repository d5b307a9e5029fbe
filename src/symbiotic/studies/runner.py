"""Runs a study: what is finished is found, the rest is begun in a good order, and all of it ends in a report.

Whatever ends it (a kill, a dead worker, its budget), the same command goes on: runs resume from their checkpoints, and
the summary is that of a study that nothing interrupted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.claim import owner
from symbiotic.files import WRITING, read_json
from symbiotic.runs import VERSIONS, provenance
from symbiotic.schema import RunError
from symbiotic.studies import ledger, results_file
from symbiotic.studies.member import OUTPUT, RUNNER
from symbiotic.studies.plan import Cell, Forecast, forecast, missing_parents, timed_before
from symbiotic.studies.runs_of import listed, read_run
from symbiotic.studies.study import Study

Launch = Callable[[Sequence[Sequence[str]]], Any]
"""Overrides of jobs -> they have ended, well or not."""


HOPELESS = ("stopped", "refused", "over budget")
"""How runs end that end so again."""


@dataclass
class StudyRun:
    """
    Args:
        folder: of all runs of the study. launch: by Hydra's launcher. processes: that it runs side by side; None where
            it does not say (a cluster), and then parents and runs are launched one after the other.
    """

    study: Study
    cells: Sequence[Cell]
    folder: Path
    launch: Launch
    processes: int | None = 1
    say: Callable[[str], None] = print

    @property
    def results(self) -> Path:
        return self.folder / results_file.FILE

    def prepare(self) -> None:
        """Find what is finished, and give it its row.

        Raises:
            RunError: results of other code or versions, with which new ones do not mix.
        """
        self.borrow()
        finished = [cell for cell in self.cells if (cell.folder / "summary.json").is_file()]
        rows = [results_file.row_of(read_run(cell.folder), cell.arm, self.study.logged) for cell in finished]
        self._check_same([*results_file.read_rows(self.results), *rows])
        results_file.add_rows(self.results, rows)

    def borrow(self) -> list[str]:
        """Copy finished runs of the same config, seed, code and versions from studies beside this one, but for their
        checkpoints; returns their names."""
        made, taken = provenance(), []
        for cell in self.left():
            for path in sorted(self.folder.parent.glob(f"*/{cell.run}/summary.json")):
                its = (read_json(path) or {}).get("provenance") or {}
                if cell.folder.exists() or any(its.get(name) != made[name] for name in ("code", *VERSIONS)):
                    continue
                away = self.folder / f".{cell.run}.{os.getpid()}{WRITING}"
                shutil.copytree(path.parent, away, ignore=shutil.ignore_patterns("checkpoints", ".*"))
                away.rename(cell.folder)
                taken.append(f"{path.parent.parent.name}/{cell.run}")
        if taken:
            self.say(f"the same runs as in studies beside this one, copied: {listed(taken)}")
        return taken

    def _check_same(self, rows: Sequence[Mapping[str, str]]) -> None:
        made = provenance()
        for row in rows:
            for name in ("code", *VERSIONS):
                was = row.get(f"provenance:{name}", "")
                if was != made[name]:
                    help_ = (
                        f"check out commit {row.get('provenance:commit', '?')} to go on, or give the study another name"
                    )
                    line = f"{row['run']} is of {name} {was or '?'}, this is {made[name]}; results do not mix: {help_}"
                    raise RunError(f"{self.results}: {line}")

    def left(self) -> list[Cell]:
        """Runs without a row."""
        have = {row["run"] for row in results_file.read_rows(self.results)}
        return [cell for cell in self.cells if cell.run not in have]

    def begin(self) -> list[Cell]:
        """Of the runs that are left, those to begin: no other process is at them, and no alarm stopped them."""
        stopped = {run for run, e in ledger.failures(ledger.read(self.folder)).items() if e.status == "stopped"}
        return [cell for cell in self.left() if owner(cell.folder) is None and cell.run not in stopped]

    def forecast(self) -> Forecast:
        cells, timed = self.begin(), ledger.timed(ledger.read(self.folder))
        if not timed["run"]:
            timed = timed_before(cells)
        return forecast(cells, len(missing_parents(cells)), self.processes, timed)

    def run(self) -> bool:
        """Whether every run has its row now."""
        self.prepare()
        os.environ[RUNNER] = str(os.getpid())
        begun: dict[str, int] = {}
        alone: set[str] = set()  # were at work when a worker ended, and nobody knows which of them ended it
        while cells := [cell for cell in self.begin() if begun.get(cell.run, 0) <= self.study.retries]:
            again = [cell for cell in cells if cell.run in begun or cell.run in alone]
            if again:
                self.say(f"begun again: {listed(cell.run for cell in again)}")
            one_by_one = [cell for cell in cells if cell.run in alone]
            cells = one_by_one or cells
            before, lines = {cell.run: printed(cell) for cell in cells}, len(ledger.read(self.folder))
            for batch in [[cell] for cell in one_by_one] or [cells]:
                self._launch(batch)
            if self._over_budget():
                break
            ended = ledger.read(self.folder)[lines:]
            failed, told = ledger.failures(ended), {entry.run for entry in ended}
            tried = [cell for cell in cells if printed(cell) != before[cell.run] or cell.run in told]
            for cell in tried or cells:  # a worker's end takes the jobs with it that had not begun
                if tried and cell.run not in told and not one_by_one:
                    alone.add(cell.run)
                    continue
                hopeless = failed[cell.run].status in HOPELESS if cell.run in failed else False
                begun[cell.run] = self.study.retries + 1 if hopeless else begun.get(cell.run, 0) + 1
        return not self.left()

    def _launch(self, cells: Sequence[Cell]) -> None:
        """Parents first: then no run waits for one that is being made, nor a core for that run."""
        parents = [[*parent.cell.overrides, "parent_only=true"] for parent in missing_parents(cells)]
        runs = [list(cell.overrides) for cell in cells]
        for batch in [[*parents, *runs]] if self.processes is not None else [parents, runs]:
            if batch:
                try:
                    self.launch(batch)
                except Exception as error:  # joblib gives up all jobs when one worker dies: the others are begun again
                    self.say(f"a worker ended: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _over_budget(self) -> bool:
        budget = self.study.budget_hours
        return budget is not None and bool(self.left()) and ledger.hours(ledger.read(self.folder)) >= budget

    def ending(self) -> list[str]:
        """A line for every run that is not there, why, and what would help."""
        left, entries = self.left(), ledger.read(self.folder)
        failed = ledger.failures(entries)
        lines = []
        for cell in left:
            why, at_work = failed.get(cell.run), owner(cell.folder)
            ended = "its process ended without a word" if printed(cell) else "not begun"
            text = f"{why.status}: {why.text}" if why else ended
            text = f"{at_work} is at work on it" if at_work else text
            lines.append(f"missing: {cell.arm}, seed {cell.seed} ({cell.folder}): {text}")
        if self._over_budget():
            spent, budget = ledger.hours(entries), self.study.budget_hours
            done = len(self.cells) - len(left)
            lines.append(
                f"stopped at the budget: {spent:.2f} of {budget:g} hours, {done} of {len(self.cells)} runs; "
                "++study.budget_hours=… and the same command go on"
            )
        return lines


def printed(cell: Cell) -> int:
    """Bytes of a run's output: more of them where it was begun."""
    path = cell.folder / OUTPUT
    return path.stat().st_size if path.is_file() else 0
