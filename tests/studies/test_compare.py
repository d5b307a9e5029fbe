"""Runs side by side: arms, their spread, and what must not be mixed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from symbiotic import arc
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.config import compose
from symbiotic.runs import read_json, write_json
from symbiotic.studies.compare import arms, cell, main, read_runs

FEW = ["experiment=smoke", "phases=none", "phases.steps=2", "evaluation.every=0", "log_every=1"]


@pytest.fixture(scope="module")
def runs(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    paths = [f"paths.runs={folder}", f"paths.data={shared_tmp / 'data'}", f"paths.cache={shared_tmp / 'cache'}"]
    for more in (["seed=0"], ["seed=1"], ["rates=uniform"], ["mix=und_only"]):
        arc.run(compose([*FEW, *paths, *more]))
    return folder


def test_runs_that_differ_in_the_seed_are_one_arm(runs: Path) -> None:
    found = {arm.name: arm for arm in arms(read_runs(runs))}
    assert {name: len(arm.runs) for name, arm in found.items()} == {
        "lr 0.0003, gen 0.003 task 0.003 lora 0.003 latent 0.003": 2,
        "lr 0.0007": 1,
        "lr 0.0003, gen 0.003 task 0.003 lora 0.003 latent 0.003, without t2i+t2i_long": 1,
    }
    two = found["lr 0.0003, gen 0.003 task 0.003 lora 0.003 latent 0.003"]
    assert [run.config["seed"] for run in two.runs] == [0, 1]
    own = [read_json(run.folder / "summary.json")["scores"]["flow_error"] for run in two.runs]
    assert two.values(2, "flow_error") == own


def test_the_table_and_the_raw_numbers(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--steps", "2", "--csv", str(tmp_path / "results.csv")]) == 0
    assert "| lr 0.0007 | 1 |" in capsys.readouterr().out
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"stage 0", "0", "2", "last log"}
    assert len({row["code"] for row in rows}) == 1


def test_logged_metrics_are_averaged_over_steps(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--metrics", "train/ce", "routing/layer*/capacity@1/vae", "--between", "0", "2"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    columns = "| arm | seeds | train/ce | routing/layer0/capacity@1/vae | routing/layer1/capacity@1/vae |"
    assert head == columns
    found = {arm.name: arm for arm in arms(read_runs(runs))}
    rows = [read_rows(run.folder / "metrics.csv") for run in found["lr 0.0007"].runs]
    mean = sum(float(row["train/ce"]) for row in rows[0] if row["train/ce"]) / 2
    assert any(line.startswith(f"| lr 0.0007 | 1 | {mean:.3f} |") for line in lines)
    assert main([str(runs), "--metrics", "nothing/*"]) == 1
    assert capsys.readouterr().err == "error: --metrics nothing/*: nothing of that name was logged\n"


def test_arms_are_named_by_what_alarms_and_ablations_change(runs: Path) -> None:
    found = read_runs(runs)[:2]
    found[0].config["callbacks"]["collapse_alarm"]["action"] = "revive"
    found[0].summary["events"] = {"intervention": 2}
    found[1].config["ablation"] = ["random_split"]
    ends = {arm.name.split(", ")[-1] for arm in arms(found)}
    assert ends == {"ablation random_split", "alarm: revive (its alarm intervened)"}


def test_spread_needs_two_seeds() -> None:
    assert cell([]) == "–"
    assert cell([0.5]) == "0.500"
    assert cell([0.4, 0.6]) == "0.500 ± 0.141"


def test_runs_of_other_code_or_data_are_refused_by_name(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = sorted(runs.rglob("summary.json"))[-1]
    kept = odd.read_text()
    changed = json.loads(kept)
    changed["provenance"]["code"] = "something else"
    write_json(odd, changed)
    try:
        assert main([str(runs)]) == 1
    finally:
        odd.write_text(kept)
    assert f"error: {odd.parent}: other code (something else)" in capsys.readouterr().err


def test_a_run_that_its_alarm_stopped_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "stopped"
    folder.mkdir()
    event = {"step": 5, "kind": "intervention", "text": "routing collapse at step 5", "action": "stop"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert main([str(runs)]) == 0
    assert capsys.readouterr().err == f"left out: {folder}: routing collapse at step 5\n"


def test_a_folder_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: no finished run (a folder with summary.json) in here\n"
