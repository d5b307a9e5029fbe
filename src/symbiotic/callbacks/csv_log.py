"""metrics.csv that survives new columns, a kill, and a resume.

Lightning's CSVLogger deletes an existing metrics.csv when it starts and buffers rows in memory. This one continues the
file: a row is on disk when `log_metrics` returns, metrics of one step share a row, and a run that resumes at an
earlier step takes back the rows from there on.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from symbiotic.files import commit, naming, say_damaged

Row = dict[str, Any]


class CSVLog(Logger):
    """Writes `<save_dir>/metrics.csv`: one row a step, first column `step`, empty cells where nothing was logged."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] | None = None  # None until the file was looked at
        self._last: Row = {}
        self._last_start = 0  # byte where the last row begins

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`; rows of later steps, from before a resume, are dropped."""
        if self._columns is None:
            self._open()
        assert self._columns is not None
        last = int(self._last.get("step", -1))
        step = last + 1 if step is None else step
        row: Row = {"step": step, **{name: f"{float(value):.9g}" for name, value in metrics.items()}}
        if step == last:
            row = self._last | row
        new = [name for name in row if name not in self._columns]
        if new or step < last:
            self._rewrite(self._columns + new, [*(r for r in self._read() if int(r["step"]) < step), row])
        else:
            self._append(row, over=step == last)

    def _open(self) -> None:
        """Take over what an earlier process wrote, without a row that it was killed in."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._read()
        self._rewrite(list(rows[0]) if rows else ["step"], rows)

    def _read(self) -> list[Row]:
        return read_rows(self.path)

    def _rewrite(self, columns: list[str], rows: list[Row]) -> None:
        """The whole file anew, at once: a kill finds all of the rows or all that were there before."""

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows[:-1])
                self._last_start = file.tell()
                writer.writerows(rows[-1:])

        commit(self.path, write)
        self._columns, self._last = columns, rows[-1] if rows else {}

    def _append(self, row: Row, over: bool = False) -> None:
        """Behind the last row, or over it; what the shorter of two rows leaves of the other is cut off afterwards."""
        assert self._columns is not None
        with naming(self.path), self.path.open("r+", newline="") as file:
            self._last_start = file.seek(*(self._last_start, os.SEEK_SET) if over else (0, os.SEEK_END))
            csv.DictWriter(file, fieldnames=self._columns, lineterminator="\n").writerow(row)
            file.truncate()
        self._last = row


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics.csv, as text; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    sound = [row for row in rows if None not in row and None not in row.values() and row["step"].isdigit()]
    if len(sound) < len(rows):
        say_damaged(path, len(rows) - len(sound))
    return sound


def last_values(path: Path | str) -> dict[str, float]:
    """The newest value of every metric of a metrics.csv, without `step`.

    What `log.latest_metrics` knows lives in the process that trained: forked ranks take it with them, and a fit that
    found nothing left to do has none.
    """
    out: dict[str, float] = {}
    for row in read_rows(Path(path)):
        out |= {name: float(value) for name, value in row.items() if value != "" and name != "step"}
    return out
