"""`results.csv` of a study: one row for every finished run, added when it ends, and read back as the run.

A row holds all of a run's `summary.json`, its scores over the steps and what the study asked to be kept of its log, so
a study can go on, and be reported, where the folders of some of its runs are not: on another day, on another machine.
Columns are the keys of these files joined by colons: `scores:reading`, `scores@150:reading`, `provenance:code`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from symbiotic.runs import locked, write_text
from symbiotic.schema import RunError
from symbiotic.studies.curves import Series
from symbiotic.studies.runs_of import Run

FILE = "results.csv"
FIRST = ("run", "arm", "seed")
"""run: the name of its folder, which its config and seed decide."""

WORDS = ("run", "arm", "provenance:", "parent", "data", "name", "system")
"""Columns whose cells are texts, also where they look like numbers."""

SCORES, LOGGED = "scores@", "logged@"


def row_of(run: Run, arm: str, logged: Collection[str] = ()) -> dict[str, str]:
    """logged: names of the run's log that are kept, `*` for any text."""
    content: dict[str, Any] = {**run.summary, "parameters": run.parameters or {}}
    content |= {f"{SCORES}{step}": scores for step, scores in sorted(run.scores.items())}
    for name, (steps, values) in run.metrics.items():
        if any(fnmatchcase(name, pattern) for pattern in logged):
            for step, value in zip(steps, values, strict=True):
                content.setdefault(f"{LOGGED}{step}", {})[name] = value
    facts = {"run": run.folder.name, "arm": arm, "seed": run.seed}
    return {key: cell(value) for key, value in (facts | flattened(content)).items()}


def run_of(row: Mapping[str, str], config: Mapping[str, Any], folder: Path) -> Run:
    """The run of a row. config: that of its arm, whose seed it gets. folder: where runs lie; its own need not exist."""
    values = {key: value_of(key, text) for key, text in row.items() if text != "" and key not in ("run", "arm")}
    summary = unflattened(values)
    scores = {int(key.removeprefix(SCORES)): summary.pop(key) for key in list(summary) if key.startswith(SCORES)}
    logged: dict[str, Series] = {}
    for key in [key for key in summary if key.startswith(LOGGED)]:
        for name, value in summary.pop(key).items():
            steps, found = logged.setdefault(name, ([], []))
            steps.append(int(key.removeprefix(LOGGED)))
            found.append(value)
    run = Run(folder / row["run"], summary, {**config, "seed": int(row["seed"])}, scores)
    run.metrics = logged
    return run


def read_rows(path: Path) -> list[dict[str, str]]:
    """In the order in which they were written; [] where there is no file.

    Raises:
        RunError: it is no such file, or holds a run twice with different content.
    """
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), restkey="", restval=None))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    kept: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 2):
        if any(row.get(key) in (None, "") for key in FIRST) or None in row.values() or "" in row:
            raise RunError(f"{path}, line {number}: not the row of a run; take the line out, and the run is made again")
        known = kept.setdefault(row["run"], row)
        if known != row:
            raise RunError(f"{path}, line {number}: {row['run']} is there twice with other results; keep one of them")
    return list(kept.values())


def add_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Add the rows of runs that are not there yet; the file appears whole, also when processes write at once."""
    with locked(path.parent / f".{path.name}.lock"):
        known = read_rows(path)
        have = {row["run"] for row in known}
        new = [dict(row) for row in rows if row["run"] not in have]
        if new:
            everything = [*known, *new]
            columns = dict.fromkeys([*FIRST, *(key for row in everything for key in row)])
            out = io.StringIO()
            writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(everything)
            write_text(path, out.getvalue())


# --------------------------------------------------------------------------- cells


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a:b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            out |= flattened(value, f"{prefix}{key}:") or {f"{prefix}{key}": {}}
        else:
            out[f"{prefix}{key}"] = value
    return out


def unflattened(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(":")
        node = out
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return out


def cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def value_of(column: str, text: str) -> Any:
    if column.startswith(WORDS):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
