"""results.csv of a study: a run goes in and comes out again; kills, twins and damaged lines."""

from __future__ import annotations

import csv
import multiprocessing
from pathlib import Path

import pytest

from studies.studied import write_run
from symbiotic.schema import RunError
from symbiotic.studies.results_file import FILE, add_rows, read_rows, row_of, run_of
from symbiotic.studies.runs_of import plain, read_run

HASHES = {"code": "123456789012", "commit": "1e5", "torch": "2.15", "numpy": "2.4", "lightning": "2.6"}


def test_a_run_comes_back_as_it_went_in(tmp_path: Path) -> None:
    """Also versions and hashes that look like numbers, names with dots, and what was not measured."""
    made = read_run(write_run(tmp_path, "symbiotic", 3, provenance=HASHES, judges={}))
    made.summary["scores"]["reading"] = None
    made.scores[20]["flow_error"] = 0.1 + 0.2
    add_rows(tmp_path / FILE, [row_of(made, "arm, 1", ["leak/*"])])
    (row,) = read_rows(tmp_path / FILE)
    back = run_of(row, {**plain(made.config), "seed": 0}, tmp_path)
    assert back.summary == {**made.summary, "parameters": {}}
    assert back.scores == made.scores
    assert back.metrics == {"leak/all": made.metrics["leak/all"]}
    assert (back.seed, back.folder, row["arm"]) == (3, made.folder, "arm, 1")
    assert back.score("reading") == made.score("reading") == made.scores[20]["reading"]
    assert back.score("routing/capacity@1/vae") == 0.8


def test_rows_are_added_once_and_new_columns_join(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path, "symbiotic", 0))
    add_rows(tmp_path / FILE, [row_of(first, "a")])
    whole = (tmp_path / FILE).read_bytes()
    add_rows(tmp_path / FILE, [row_of(first, "a")])
    assert (tmp_path / FILE).read_bytes() == whole
    second = read_run(write_run(tmp_path, "symbiotic", 1, evaluated=False))
    second.summary["scores"]["new"] = 1.0
    add_rows(tmp_path / FILE, [row_of(second, "a")])
    rows = read_rows(tmp_path / FILE)
    assert [row["scores:new"] for row in rows] == ["", "1.0"]
    assert {key: value for key, value in rows[0].items() if value} == row_of(first, "a")


def write_one(folder: Path, seed: int) -> None:
    add_rows(folder / FILE, [{"run": f"r{seed}", "arm": "a", "seed": str(seed), f"x:{seed}": "1"}])


def test_processes_that_end_together_lose_no_row(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=write_one, args=(tmp_path, seed)) for seed in range(12)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert sorted(row["seed"] for row in read_rows(tmp_path / FILE)) == sorted(map(str, range(12)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run,arm,seed\nr0,a\n", "line 2: not the row of a run"),
        ("run,arm,seed\nr0,a,0,5\n", "line 2: not the row of a run"),
        ("run,arm,seed,x\nr0,a,0,1\nr0,a,0,2\n", "line 3: r0 is there twice with other results"),
        ("arm,seed\na,0\n", "line 2: not the row of a run"),
        ("run,arm,seed\n\xff", "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=line):
        read_rows(tmp_path / FILE)


def test_the_same_row_twice_counts_once(tmp_path: Path) -> None:
    """Two files of two machines may be put together."""
    row = {"run": "r0", "arm": "a", "seed": "0"}
    with (tmp_path / FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows([row, row])
    assert read_rows(tmp_path / FILE) == [row]
