"""`python src/train.py study=…` with real runs: from the first to the report, killed, resumed, in two processes."""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from symbiotic import launch
from symbiotic.config import CONF
from symbiotic.studies import study
from symbiotic.studies.results_file import FILE, read_rows

SMALL = ["study=smoke", "++study.leave_out=[{rates: 'one rate'}]", "study.reference='one pool, two rates'", "seed=0"]
"""Two arms, one seed."""


def places(root: Path, shared: Path | None = None) -> dict[str, str]:
    """Where a study reads and writes. shared: of the data and the parents of all tests."""
    folders = {"runs": root / "runs", "data": (shared or root) / "data", "cache": (shared or root) / "cache"}
    return {f"SYMBIOTIC_{name.upper()}": str(folder) for name, folder in folders.items()}


def start(root: Path, arguments: list[str], project_root: Path, shared: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | places(root, shared)
    command = [sys.executable, "src/train.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=project_root, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


def finished(root: Path, arguments: list[str], project_root: Path, shared: Path | None = None) -> tuple[int, str]:
    process = start(root, arguments, project_root, shared)
    out, _ = process.communicate()
    return process.returncode, out


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """SIGKILL to the study and nothing else: its workers must end by themselves."""
    while process.poll() is None and not ready():
        time.sleep(0.05)
    process.kill()
    process.communicate()


def test_a_study_that_is_killed_goes_on_and_ends_in_a_report(
    shared_tmp: Path,
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "runs" / "smoke"
    process = start(tmp_path, SMALL, project_root, shared_tmp)
    kill_when(process, lambda: len(read_rows(folder / FILE)) == 1)
    assert process.returncode == -signal.SIGKILL
    first = read_rows(folder / FILE)
    status, out = finished(tmp_path, SMALL, project_root, shared_tmp)
    assert status == 0, out
    assert re.search(r"study smoke: 1 of 2 runs are there; to make: 1 runs, 0 parents: about [\d.]+ hours", out)
    assert "run of two pools, two rates, seed 0: done" in out
    rows = read_rows(folder / FILE)
    assert rows[:1] == first
    assert [row["arm"] for row in rows] == ["one pool, two rates", "two pools, two rates"]
    report = (folder / "report" / "report.md").read_text()
    assert "What each factor does" in report
    assert "step" in (folder / rows[0]["run"] / "output.txt").read_text()
    for name, place in places(tmp_path, shared_tmp).items():
        monkeypatch.setenv(name, place)
    study._composed.cache_clear()  # which knows the folders of the test before
    assert launched(*SMALL) == 0
    assert "to make: 0 runs" in capsys.readouterr().out


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, place in places(tmp_path).items():
        monkeypatch.setenv(name, place)
    study._composed.cache_clear()  # which knows the folders of the test before
    return tmp_path


def launched(*arguments: str) -> int:
    """The same in this process: the exit status."""
    return launch.launch(get_args_parser().parse_args(list(arguments)))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rates.lr=1e-3"], "error: rates.lr=1e-3: a study says what its runs are"),
        (["seed=7"], "error: seed=7: must be one of study.seeds, [0, 1]"),
        (["seed=a"], "error: seed=a: must be whole numbers, as in seed=0,1"),
        (["study.factors=[system]"], "no declared factor"),
        (["study.name=other"], "error: study.name=other: must be smoke, the name of its file"),
        (["++study.budget_hours=-1"], "error: study.budget_hours=-1: must not be below 0"),
        (["++study.retries=-1"], "error: study.retries=-1: must not be below 0"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "n_jobs=0: must be a number of processes, or -1 for"),
        (["data.samples=8"], "changes arm one pool, one rate: data.samples is 8"),
    ],
)
def test_a_wrong_study_is_one_line_and_nothing_starts(
    arguments: list[str], line: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched("study=smoke", *arguments) == 2
    assert line in capsys.readouterr().err
    assert not list(folders.iterdir())


def test_a_second_study_in_the_folder_is_refused_and_a_plan_costs_nothing(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched("study=smoke", "dry_run=true", "threads=1", "++study.budget_hours=2", "log_every=7") == 0
    printed = capsys.readouterr().out
    assert "study smoke: 0 of 8 runs are there; to make: 8 runs, 2 parents" in printed
    assert "; budget 2 hours" in printed
    assert not list(folders.rglob("config.yaml"))
    with (folders / "runs" / "smoke" / ".claim").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert launched("study=smoke") == 1
    assert "is at work in this folder; wait for it, or stop it, to run the study" in capsys.readouterr().err


def test_a_study_of_ones_own_folder(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path_factory.mktemp("conf")
    (own / "study").mkdir()
    text = (CONF / "study" / "smoke.yaml").read_text()
    (own / "study" / "mine.yaml").write_text(text.replace("name: smoke", "name: mine"))
    assert launched("--config-dir", str(own), "study=mine", "dry_run=true") == 0
    assert "study mine: 0 of 8 runs are there" in capsys.readouterr().out
    assert launched("--config-dir", str(own / "nowhere"), "study=mine") == 2
    assert capsys.readouterr().err == f"error: --config-dir {own / 'nowhere'}: no such folder\n"
    assert launched("study=mine") == 2


# --------------------------------------------------------------------------- minutes


def summary(root: Path) -> dict[str, object]:
    """What a study says: its report and its rows, but for dates and seconds."""
    folder = root / "runs" / "smoke"
    rows = [{k: v for k, v in row.items() if "seconds" not in k.split(":")} for row in read_rows(folder / FILE)]
    text = (folder / "report" / "report.md").read_text().replace(str(root), "")
    text = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
    text = "\n".join(line for line in untimed(text) if "date" not in line)
    figures = {path.name: path.read_bytes() for path in sorted((folder / "report" / "figures").glob("*.png"))}
    return {"rows": sorted(rows, key=lambda row: row["run"]), "text": text, "figures": figures}


def untimed(text: str) -> Iterator[str]:
    """The lines, but for those about seconds, and without the columns of tables that hold them."""
    timed: list[int] = []
    for line in text.splitlines():
        cells = line.split(" | ")
        timed = timed if line.startswith("|") else []
        timed = timed or [n for n, cell in enumerate(cells) if "training, s<" in cell]
        if "seconds" not in line:
            yield " | ".join(cell for n, cell in enumerate(cells) if n not in timed)


@pytest.mark.slow
def test_with_fewer_parents_than_processes_a_run_waits_for_its_parent(tmp_path: Path, project_root: Path) -> None:
    arguments = ["study=smoke", "seed=0", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    status, out = finished(tmp_path, arguments, project_root)
    assert status == 0, out
    assert "parent of one pool, one rate, seed 0: done" in out
    rows = read_rows(tmp_path / "runs" / "smoke" / FILE)
    arms = {f"{pools} {rates}" for pools in ("one pool,", "two pools,") for rates in ("one rate", "two rates")}
    assert {row["arm"] for row in rows} == arms


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_five_random_moments_a_study_says_the_same(tmp_path: Path, project_root: Path) -> None:
    """Two runs side by side; once it is one of the two workers that is killed, and the study goes on by itself."""
    arguments = ["study=smoke", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start_time = time.monotonic()
    status, out = finished(whole, arguments, project_root)
    assert status == 0, out
    took, moments = time.monotonic() - start_time, random.Random(0)
    for _ in range(5):
        process = start(killed, arguments, project_root)
        until = time.monotonic() + moments.uniform(0.1, 0.4) * took
        kill_when(process, lambda until=until: time.monotonic() > until)  # type: ignore[misc]
    process = start(killed, arguments, project_root)
    while process.poll() is None and not (children := workers(process.pid)):
        time.sleep(0.2)
    if process.poll() is None:
        os.kill(children[0], signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert summary(killed) == summary(whole)


def workers(pid: int) -> list[int]:
    """Processes of joblib that the study started."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "loky"], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]
