"""A study's runs, in order, once, again after failures, and never past the budget. What a run computes is written by
hand here, so that orders and failures can be chosen; `test_study_command.py` runs real ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from studies.studied import write_run
from symbiotic import runs
from symbiotic.arc import SECONDS, joint_key
from symbiotic.claim import claimed
from symbiotic.files import write_json
from symbiotic.schema import CollapseStop, Config, ConfigError, RunError
from symbiotic.stop import Stopped
from symbiotic.studies import ledger
from symbiotic.studies.evaluation_command import check_there
from symbiotic.studies.member import OverBudget, run_member
from symbiotic.studies.plan import Cell, cells_of, forecast, with_seed
from symbiotic.studies.results_file import FILE, read_rows
from symbiotic.studies.runner import StudyRun
from symbiotic.studies.study import Study, study_of
from symbiotic.studies.watch import Watch, at, states

NODE: dict[str, Any] = {
    "name": "tried",
    "experiment": "smoke",
    "seeds": [0, 1],
    "reference": "standard",
    "factors": ["system", "phases"],
    "arms": {"symbiotic": [], "standard": ["system=standard_moe", "phases=none"]},
}


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of({"study": NODE})


@pytest.fixture
def cells(study: Study, tmp_path: Path) -> list[Cell]:
    """With folders below the test's own; no data or parent is there."""

    def moved(cell: Cell) -> Cell:
        paths = dataclasses.replace(cell.config.paths, runs=str(tmp_path), cache=str(tmp_path / "cache"))
        config = dataclasses.replace(cell.config, paths=paths, run_dir=str(tmp_path / study.name / cell.run))
        config = dataclasses.replace(config, study={"member": cell.arm, "budget_hours": study.budget_hours})
        return dataclasses.replace(cell, config=config)

    return [moved(cell) for cell in cells_of(study, [], unused)]


def unused(overrides: Sequence[str]) -> Config:
    raise AssertionError("composed again though nothing was added")


class Launcher:
    """Jobs one after another in this process; `act` is what a run does, by its arm and seed."""

    def __init__(self, cells: Sequence[Cell], act: Callable[[Cell], float] | None = None) -> None:
        self.cells = {cell.overrides: cell for cell in cells}
        self.act, self.begun, self.batches = act or finish, list[str](), list[int]()

    def __call__(self, jobs: Sequence[Sequence[str]]) -> None:
        self.batches.append(len(jobs))
        for job in jobs:
            parent = job[-1] == "parent_only=true"
            cell = self.cells[tuple(job[:-1] if parent else job)]
            self.begun.append(f"{'parent' if parent else cell.arm} {cell.seed}")
            config = dataclasses.replace(cell.config, parent_only=parent)
            try:
                run_member(config, lambda _, cell=cell, parent=parent: 0.0 if parent else self.act(cell))  # type: ignore[misc]
            except (RunError, ConfigError, CollapseStop):
                continue


def finish(cell: Cell) -> float:
    """As a real run leaves its folder."""
    made = write_run(cell.folder.parent / "made", cell.arm, cell.seed, provenance=runs.provenance(), evaluated=False)
    shutil.copytree(made, cell.folder, dirs_exist_ok=True)
    shutil.rmtree(made.parent)
    return 0.0


def made_by(launcher: Launcher, cells: Sequence[Cell], study: Study, **more: Any) -> StudyRun:
    return StudyRun(study, cells, cells[0].folder.parent, launcher, **more)


def test_parents_first_then_seed_by_seed_and_every_run_has_its_row(cells: list[Cell], study: Study) -> None:
    launcher = Launcher(cells)
    assert made_by(launcher, cells, study).run()
    runs_ = ["symbiotic 0", "standard 0", "symbiotic 1", "standard 1"]
    assert launcher.begun == ["parent 0", "parent 1", *runs_]
    assert launcher.batches == [6]
    rows = read_rows(cells[0].folder.parent / FILE)
    assert [f"{row['arm']} {row['seed']}" for row in rows] == runs_
    assert [row["run"] for row in rows] == [cell.run for cell in cells]


def test_a_run_that_a_study_beside_it_made_is_taken_from_there(cells: list[Cell], study: Study) -> None:
    """Same config, seed and code: copied without its checkpoints. Of other code, or unfinished: made here."""
    beside = cells[0].folder.parents[1] / "beside"
    finish(cells[0])
    (cells[0].folder / "checkpoints").mkdir()
    cells[0].folder.rename((beside / cells[0].run).parent.mkdir() or beside / cells[0].run)
    finish(cells[1])
    other = json.loads((cells[1].folder / "summary.json").read_text())
    other["provenance"]["code"] = "0dd"
    cells[1].folder.rename(beside / cells[1].run)
    (beside / cells[1].run / "summary.json").write_text(json.dumps(other))
    (beside / cells[2].run).mkdir()
    launcher, said = Launcher(cells), list[str]()
    assert made_by(launcher, cells, study, say=said.append).run()
    assert launcher.begun == ["parent 0", "parent 1", "standard 0", "symbiotic 1", "standard 1"]
    assert said == [f"the same runs as in studies beside this one, copied: beside/{cells[0].run}"]
    assert read_rows(cells[0].folder.parent / FILE)[0]["run"] == cells[0].run
    assert not (cells[0].folder / "checkpoints").exists()
    assert not list(cells[0].folder.parent.glob("*.writing"))


def test_a_cluster_gets_parents_and_runs_apart(cells: list[Cell], study: Study) -> None:
    launcher = Launcher(cells)
    assert made_by(launcher, cells, study, processes=None).run()
    assert launcher.batches == [2, 4]


def test_what_is_there_is_not_made_again_by_folder_or_by_row(cells: list[Cell], study: Study) -> None:
    assert made_by(Launcher(cells), cells, study).run()
    folder, whole = cells[0].folder.parent, (cells[0].folder.parent / FILE).read_bytes()
    shutil.rmtree(cells[0].folder)  # its row says enough
    again = Launcher(cells)
    assert made_by(again, cells, study).run()
    assert again.begun == []
    (folder / FILE).unlink()  # and the folders of the others say the same
    assert made_by(again, cells, study).run()
    assert again.begun == ["parent 0", "symbiotic 0"]
    assert sorted((folder / FILE).read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_run_that_fails_is_begun_again_and_then_reported(cells: list[Cell], study: Study) -> None:
    tries: list[str] = []

    def act(cell: Cell) -> float:
        tries.append(cell.run)
        if cell.arm == "standard" and (cell.seed == 1 or tries.count(cell.run) == 1):
            raise RunError("the disk is full")
        return finish(cell)

    made = made_by(Launcher(cells, act), cells, study)
    assert not made.run()
    assert [tries.count(cell.run) for cell in cells] == [1, 2, 1, 2]
    (line,) = made.ending()
    assert line.startswith("missing: standard, seed 1 (")
    assert "RunError: the disk is full" in (cells[3].folder / "output.txt").read_text()
    assert line.endswith("failed: the disk is full")


@pytest.mark.parametrize("error", [CollapseStop("its alarm stopped it"), ConfigError("a wrong key")])
def test_what_would_fail_again_is_not_tried_again(error: Exception, cells: list[Cell], study: Study) -> None:
    tries: list[str] = []

    def act(cell: Cell) -> float:
        tries.append(cell.run)
        if cell is cells[0]:
            raise error
        return finish(cell)

    made = made_by(Launcher(cells, act), cells, study)
    assert not made.run()
    assert tries.count(cells[0].run) == 1
    assert str(error) in made.ending()[0]


def test_a_worker_that_dies_costs_a_try_and_nothing_else(cells: list[Cell], study: Study) -> None:
    """joblib raises for all jobs when one process dies."""
    inner, lines = Launcher(cells), list[str]()

    def launch(jobs: Sequence[Sequence[str]]) -> None:
        if not inner.batches:
            inner(jobs[:3])
            raise RuntimeError("a worker process was terminated")
        inner(jobs)

    made = StudyRun(study, cells, cells[0].folder.parent, launch, say=lines.append)
    assert made.run()
    assert [inner.begun.count(f"{cell.arm} {cell.seed}") for cell in cells] == [1, 1, 1, 1]
    assert "a worker ended: RuntimeError: a worker process was terminated" in lines[0]


def test_workers_that_die_cost_no_try_of_runs_that_had_not_begun(cells: list[Cell], study: Study) -> None:
    """Twice, and a run may be begun again once; each time one run was at work, and has said something."""
    deaths, lines = [cells[0], cells[1]], list[str]()
    inner = Launcher(cells)

    def launch(jobs: Sequence[Sequence[str]]) -> None:
        if deaths and len(jobs) > 3:
            cell = deaths.pop(0)
            cell.folder.mkdir(parents=True, exist_ok=True)
            with (cell.folder / "output.txt").open("a") as file:
                file.write("step 1\n")
            raise RuntimeError("a worker process was terminated")
        inner(jobs)

    made = StudyRun(study, cells, cells[0].folder.parent, launch, say=lines.append)
    assert study.retries == 1
    assert made.run()
    assert [inner.begun.count(f"{cell.arm} {cell.seed}") for cell in cells] == [1, 1, 1, 1]


def test_a_run_that_kills_its_worker_takes_no_other_with_it(cells: list[Cell], study: Study) -> None:
    """With two at work nobody knows which one it was: both are begun again, each by itself."""
    inner, batches = Launcher(cells), list[int]()

    def launch(jobs: Sequence[Sequence[str]]) -> None:
        batches.append(len(jobs))
        runs_ = [inner.cells[tuple(job)] for job in jobs if job[-1] != "parent_only=true"]
        if cells[0] not in runs_:
            inner(jobs)
            return
        for cell in runs_[:2]:
            cell.folder.mkdir(parents=True, exist_ok=True)
            with (cell.folder / "output.txt").open("a") as file:
                file.write("step 1\n")
        raise RuntimeError("a worker process was terminated")

    made = StudyRun(study, cells, cells[0].folder.parent, launch, say=lambda line: None)
    assert not made.run()
    (line,) = made.ending()
    assert line.startswith("missing: symbiotic, seed 0 (")
    assert line.endswith("its process ended without a word")
    assert [row["run"] for row in read_rows(made.results)] == [cell.run for cell in cells[1:]]


def test_a_launcher_that_begins_nothing_ends_the_study(cells: list[Cell], study: Study) -> None:
    launches = []

    def launch(jobs: Sequence[Sequence[str]]) -> None:
        launches.append(len(jobs))
        raise RuntimeError("no queue")

    made = StudyRun(study, cells, cells[0].folder.parent, launch, say=lambda line: None)
    assert not made.run()
    assert len(launches) == 1 + study.retries
    assert all(line.endswith("not begun") for line in made.ending())


def test_what_a_signal_ended_is_counted_and_goes_on(cells: list[Cell], study: Study) -> None:
    folder = cells[0].folder.parent

    def act(cell: Cell) -> float:
        raise Stopped(15)

    with pytest.raises(Stopped):
        made_by(Launcher(cells, act), cells, study).run()
    (entry,) = (entry for entry in ledger.read(folder) if entry.what == "run")
    assert (entry.status, entry.text) == ("interrupted", "stopped by SIGTERM")
    assert made_by(Launcher(cells), cells, study).run()


def test_no_run_begins_past_the_budget_and_a_larger_one_goes_on(cells: list[Cell], study: Study) -> None:
    poor = dataclasses.replace(study, budget_hours=1.0)

    def act(cell: Cell) -> float:
        spend = ledger.Entry("run", "other", cell.arm, cell.seed, "done", 1900.0)
        ledger.add(cell.folder.parent, spend)
        return finish(cell)

    limited = [budgeted(cell, 1.0) for cell in cells]
    launcher = Launcher(limited, act)
    made = made_by(launcher, limited, poor)
    assert not made.run()
    assert len(read_rows(made.results)) == 2
    assert made.ending()[-1].startswith("stopped at the budget: 1.06 of 1 hours, 2 of 4 runs; ++study.budget_hours=")
    assert made.ending()[0].endswith("over budget: the study's budget is spent: 1.06 of 1 hours")
    rich = [budgeted(cell, 9.0) for cell in cells]
    assert made_by(Launcher(rich, act), rich, dataclasses.replace(study, budget_hours=9.0)).run()


def budgeted(cell: Cell, hours: float) -> Cell:
    return dataclasses.replace(
        cell, config=dataclasses.replace(cell.config, study={"member": cell.arm, "budget_hours": hours})
    )


def test_results_of_other_code_are_refused_before_anything_starts(cells: list[Cell], study: Study) -> None:
    assert made_by(Launcher(cells), cells, study).run()
    results = cells[0].folder.parent / FILE
    results.write_text(results.read_text().replace(runs.run_code(), "0ther", 1))
    launcher = Launcher(cells)
    with pytest.raises(RunError, match=r"is of code 0ther, this is \w+; results do not mix: check out commit"):
        made_by(launcher, cells, study).run()
    assert launcher.begun == []


def test_a_run_that_another_process_makes_is_left_to_it(cells: list[Cell], study: Study) -> None:
    launcher = Launcher(cells)
    with claimed(cells[1].folder, "train there"):
        made = made_by(launcher, cells, study)
        assert not made.run()
        assert "is at work on it" in made.ending()[0]
    assert "standard 0" not in launcher.begun
    assert len(read_rows(made.results)) == 3


def test_beside_a_study_only_where_it_runs(study: Study) -> None:
    with pytest.raises(ConfigError, match=r"rates\.lr=1: a study says what its runs are"):
        cells_of(study, ["rates.lr=1"], unused)
    with pytest.raises(ConfigError, match=r"seed=5: must be one of study\.seeds, \[0, 1\]"):
        cells_of(study, [], unused, [5])
    assert {cell.seed for cell in cells_of(study, [], unused, [1])} == {1}


def test_a_seed_changes_the_name_of_a_folder_only(study: Study) -> None:
    config = cells_of(study, [], unused)[0].config
    other = with_seed(config, 12)
    assert Path(other.run_dir).name == Path(config.run_dir).name.replace("-seed0", "-seed12")
    assert dataclasses.replace(other, seed=0, run_dir=config.run_dir) == config


def test_the_forecast_is_by_arm_and_needs_a_timed_run(cells: list[Cell]) -> None:
    assert forecast(cells, 0, 2, {}).seconds is None
    timed = {"run": [("symbiotic", 10.0), ("symbiotic", 20.0)], "parent": [("symbiotic", 7.0)]}
    found = forecast(cells, 2, 2, timed)  # standard: the mean of all
    assert (found.runs, found.parents, found.seconds, found.wall) == (4, 2, 4 * 15 + 2 * 7, 37)
    assert forecast(cells, 2, None, timed).wall is None
    assert forecast(cells, 2, 1, {"run": [("symbiotic", 1.0)]}).seconds is None  # no parent was timed


def test_a_fresh_study_is_forecast_by_what_other_runs_took(cells: list[Cell], study: Study) -> None:
    """By the journal of the cache: joint training of the same model, system and steps, parents that were trained."""
    made = made_by(Launcher(cells), cells, study)
    assert made.forecast().seconds is None
    took = {f"joint/{joint_key(cells[0].config)}": 100.0, "stage 0/abc/False": 40.0, "stage 0/abc/True": 1.0}
    cells[0].folder.parents[1].joinpath("cache").mkdir()
    write_json(cells[0].folder.parents[1] / "cache" / SECONDS, took | {"joint/other": 9.0, "split/abc": 5.0})
    found = made.forecast()
    assert (found.runs, found.parents, found.seconds) == (4, 2, 4 * 100.0 + 2 * 40.0)


def test_the_ledger_survives_half_a_line(tmp_path: Path) -> None:
    first = ledger.Entry("run", "r", "a", 0, "failed", 3600.0, "why")
    ledger.add(tmp_path, first)
    with (tmp_path / ledger.FILE).open("a") as file:
        file.write(json.dumps({"what": "run"})[:-3] + "\n")
    ledger.add(tmp_path, dataclasses.replace(first, status="done", seconds=1800.0))
    assert ledger.hours(ledger.read(tmp_path)) == 1.5
    assert ledger.failures(ledger.read(tmp_path)[:1]) == {"r": first}


def test_states_of_runs_are_scores_steps_or_reasons(cells: list[Cell], study: Study) -> None:
    def act(cell: Cell) -> float:
        if cell.seed == 1:
            raise OverBudget("spent")
        return finish(cell)

    folder = cells[0].folder.parent
    made_by(Launcher(cells, act), cells, study).run()
    found = states(cells, folder, "reading")
    assert found[cells[0].run] == "0.850"
    assert found[cells[2].run] == "over budget"
    (cells[2].folder / "output.txt").write_text("stage 0   10/1100  ce 3\njoint  30/450  ce 1\n" + "x" * 3000)
    assert at(cells[2].folder / "output.txt") == "joint 30/450"
    with claimed(cells[2].folder, "train there"):
        assert states(cells, folder, "reading")[cells[2].run] == "joint 30/450"


def test_who_watches_sees_a_line_for_everything_that_ends(
    cells: list[Cell], study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(cell: Cell) -> float:
        if cell.arm == "standard":
            raise ConfigError("a wrong key")
        return finish(cell)

    with Watch(cells, cells[0].folder.parent, "reading", processes=2).shown(every=0.01):
        made_by(Launcher(cells, act), cells, study).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "parent of symbiotic, seed 0: done",
        "parent of symbiotic, seed 1: done",
        "run of symbiotic, seed 0: done",
        "run of standard, seed 0: refused: a wrong key",
        "run of symbiotic, seed 1: done",
        "run of standard, seed 1: refused: a wrong key",
    ]
    assert "2 of 4 runs, 0 at work, 0.00 hours so far" in lines[-1]


def test_rows_without_folders_are_reported_and_not_measured(tmp_path: Path) -> None:
    check_there([tmp_path])
    with pytest.raises(RunError, match=r"r1, r2, r3, r4 and 1 more: rows without folders.*evaluate=false reports"):
        check_there([tmp_path, *(tmp_path / f"r{i}" for i in range(1, 6))])
