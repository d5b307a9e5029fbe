"""`src/eval.py`: the command line, kills at any point, and a real run evaluated in its training and after it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from assets import write_assets
from inspected import run_folder
from symbiotic import arc
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.callbacks.in_loop_evaluation import SCORES, read_scores
from symbiotic.checks.evaluation import check_evaluation
from symbiotic.config import compose, compose_evaluation
from symbiotic.evaluation.assets import ASSETS
from symbiotic.runs import read_json
from symbiotic.schema import ConfigError, EvalConfig
from symbiotic.studies.evaluate import evaluate_run, read_results
from symbiotic.studies.evaluation_command import audited_runs, evaluate, main, row, wilson

SMOKE = "evaluation=smoke"


@pytest.fixture(scope="module")
def trained(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_folder(shared_tmp, folder, "objective.sampler.steps=2")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seconds.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --------------------------------------------------------------------------- killed


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def killed_when(there: Callable[[Path], bool], arguments: list[str], run: Path, root: Path) -> bool:
    """Start a real evaluation and kill it as soon as a condition on its folder holds; False where it ended before."""
    command = [sys.executable, str(root / "src" / "eval.py"), f"run={run}", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while process.poll() is None:
            if any(there(folder) for folder in (run / "evaluation").glob("*")):
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        return process.wait() == -signal.SIGKILL


POINTS: list[Callable[[Path], bool]] = [
    lambda folder: lines(folder / "knowledge_unreplayed.jsonl") >= 3,
    lambda folder: len(list(folder.glob("images/*/0*.png"))) >= 3,
    lambda folder: lines(folder / "flow_error.jsonl") >= 2,
    lambda folder: lines(folder / "generation.jsonl") >= 2,
]


@pytest.mark.parametrize(
    "points", [POINTS[:2], pytest.param(POINTS[2:], marks=pytest.mark.slow)], ids=["early", "late"]
)
def test_killed_at_several_points_it_ends_with_the_same_bytes(
    points: list[Callable[[Path], bool]], run: Path, tmp_path: Path, project_root: Path
) -> None:
    arguments = [SMOKE, "evaluation.batch_size=1"]
    whole = Path(shutil.copytree(run, tmp_path / "whole" / "run"))
    expected = contents(evaluate_run(compose_evaluation(["run=x", *arguments]), whole, lambda line: None))
    assert [killed_when(point, arguments, run, project_root) for point in points] == [True] * 2
    (folder,) = (run / "evaluation").iterdir()
    assert not (folder / "results.json").exists()
    assert evaluate_run(compose_evaluation(["run=x", *arguments]), run, lambda line: None) == folder
    assert contents(folder) == expected


# --------------------------------------------------------------------------- the command line


def test_the_table_the_missing_rows_and_exit_0(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ASSETS, raising=False)
    few = ["evaluation.questions=8", "evaluation.readings=4", "evaluation.images=4", "evaluation.scorers=tiny"]
    assert main([f"run={run}", "evaluation=official", *few]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "score n chance value 95 % interval" in printed
    assert "knowledge_replayed 4 0.250" in printed
    assert "embedded_fd 4" in printed
    results = read_results(next((run / "evaluation").iterdir()))
    configured = compose_evaluation([f"run={run}"]).evaluation.benchmarks
    assert len(results["missing"]) == len(configured) > 0
    for name, line in results["missing"].items():
        assert f"not measured: {name}: {line}" in printed
    assert "time: start-up" in printed
    assert "results.json" in printed
    assert main([f"run={run}", "evaluation=official", "only=[knowledge]", *few]) == 0
    assert "not measured" not in capsys.readouterr().out


def test_a_failed_benchmark_is_exit_1_after_the_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ASSETS, str(write_assets(tmp_path / "assets", images=4)))
    (tmp_path / "assets" / "coco" / "captions_val2014.json").write_text("[")
    clip = "++evaluation.benchmarks.clip_score={_target_: symbiotic.evaluation.clip_score.CLIPScore}"
    assert main([f"run={run}", SMOKE, clip]) == 1
    printed = capsys.readouterr()
    assert "FAILED: clip_score:" in printed.out
    assert "embedded_acc" in printed.out
    assert printed.err.startswith("error: 1 not measured: run: clip_score:")
    assert printed.err.count("\n") == 1


WRONG = {
    "evaluation=offical": "did you mean 'official'?",
    "evaluation.question=4": "evaluation.question=4: no such key; did you mean 'evaluation.questions'?",
    "evaluation.images=0": "evaluation.images=0: must be at least 1",
    "evaluation.every=10": "evaluation.every=10: has no effect here: only in-loop evaluations read it",
    "sampler.step=3": "did you mean 'sampler.steps'?",
    "sampler.steps=0": "sampler.steps=0: must be at least 1",
    "sampler.time_shift=0": "sampler.time_shift=0.0: must be positive",
    "report=x": "report='x': has no effect here: it is about the report, which runs=FOLDER writes",
    "only=[knowlege]": "only=knowlege: no such benchmark; did you mean 'knowledge'?",
    "device=tpu": "device=tpu: must be cpu, cuda, mps or xpu",
    "step=-1": "step=-1: must be at least 0",
    "step=last": "step='last': must be int",
    "seed=-1": "seed=-1: must be in [0, 2**32), or null",
    "threads=0": "threads=0: must be at least 1",
    "runs=x": "give one of the two",
    "system=mot": "system=mot: no such key",
    "evaluation.benchmarks.fid.refrence=x": "did you mean 'evaluation.benchmarks.fid.reference'?",
    "++evaluation.benchmarks.fid.refrence=x": "refrence: no such argument of symbiotic.evaluation.fid.FID",
    "++evaluation.benchmarks.x={_target_: os.system}": "evaluation.benchmarks.x._target_=os.system: not allowed",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_key_is_one_line(wrong: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose_evaluation(["run=x", wrong])
    assert WRONG[wrong] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "run=FOLDER evaluates one run, runs=FOLDER all below it; give one of the two"),
        (["run=a", "step=3", "ema=true"], "step=3 ema=True: each says which weights; give one of them"),
        (["runs=a", "checkpoint=b"], "checkpoint=b: has no effect here: runs=FOLDER reports what each run ended with"),
        (["runs=a", "step=0"], "step=0: has no effect here: runs=FOLDER reports what each run ended with"),
        (["runs=a", "ema=true"], "ema=True: has no effect here: runs=FOLDER reports what each run ended with"),
        (["run=nowhere"], "run=nowhere: no such folder"),
    ],
)
def test_wrong_combinations_are_exit_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments) == 2
    assert line in capsys.readouterr().err


def test_a_study_is_about_the_report() -> None:
    config = replace(compose_evaluation(["run=x"]), study="main_job")
    with pytest.raises(ConfigError, match="study=main_job: has no effect here"):
        check_evaluation(config, {})
    check_evaluation(replace(config, run=None, runs="x"), {})


def test_a_wrong_config_costs_no_torch(project_root: Path) -> None:
    code = "import sys; from symbiotic.studies.evaluation_command import main; s = main(['run=.', 'sede=1']); "
    code += "assert 'torch' not in sys.modules; sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: sede=1: no such key; did you mean 'seed'?\n"


def test_paths_are_taken_as_they_are_typed(tmp_path: Path) -> None:
    path = "~/ünï code/it's=here/step=000450.ckpt"
    typed = [f"run={path}", f"data={path}", f"checkpoint={path}", f"evaluation.benchmarks.fid.captions={path}"]
    config = compose_evaluation(typed)
    assert {config.run, config.data, config.checkpoint} == {path}
    assert (config.evaluation.benchmarks["fid"] or {})["captions"] == path
    assert compose_evaluation(["run=a,b"]).run == "a,b"
    assert compose_evaluation(["runs=a", "report=null", "data=null"]).report is None


def test_help_names_every_key_and_cfg_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert [name for name in EvalConfig.__dataclass_fields__ if f"{name}=" not in usage] == ["sampler"]
    assert main(["run=x", "evaluation=smoke", "--cfg", "job"]) == 0
    assert "questions: 16" in capsys.readouterr().out


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert wilson(0.0, 7)[0] == 0.0
    assert wilson(1.0, 7)[1] == 1.0
    low, high = wilson(0.9, 50)  # by hand: centre (.9 + 3.8415/100)/(1 + 3.8415/50)
    assert (low, high) == (pytest.approx(0.78640, abs=1e-5), pytest.approx(0.95652, abs=1e-5))
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
    plain = {"low": None, "high": None, "n": 50}
    assert row("reading", {"value": 0.9, **plain}) == ["reading", "50", "–", "0.900", "0.786 to 0.957"]
    assert row("flow_error", {"value": 0.9, **plain})[-1] == "–"
    assert row("embedded_fd", {"value": None, **plain, "n": 1})[3:] == ["–", "–"]


def test_no_finished_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"runs={tmp_path}"]) == 1
    assert "no finished run" in capsys.readouterr().err


# --------------------------------------------------------------------------- in training, and after it


@pytest.fixture(scope="module")
def real(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A smoke run with averaged weights, quick looks, one benchmark with its assets and the others without; and what
    it printed."""
    folder, patch = tmp_path_factory.mktemp("real"), pytest.MonkeyPatch()
    assets = write_assets(folder / "assets", images=4)
    shutil.rmtree(assets / "hps")
    patch.setenv(ASSETS, str(assets))
    paths = [f"paths.runs={folder}", f"paths.data={shared_tmp / 'data'}", f"paths.cache={shared_tmp / 'cache'}"]
    changed = ["evaluation.every=5", "evaluation.quick=0.5", "callbacks=[default,ema]", "logger.tensorboard=null"]
    nodes = {
        "clip_score": "{_target_: symbiotic.evaluation.clip_score.CLIPScore, num_images: 4}",
        "hps_v2": "{_target_: symbiotic.evaluation.hps.HPSv2, num_images: 4}",
    }
    added = [f"++evaluation.benchmarks.{name}={node}" for name, node in nodes.items()]
    config = compose(["experiment=smoke", *paths, *changed, *added])
    with pytest.MonkeyPatch.context() as context:
        said: list[str] = []
        context.setattr("builtins.print", lambda *parts, **_: said.append(" ".join(map(str, parts))))
        arc.run(config)
    patch.undo()
    return Path(config.run_dir), "\n".join(said)


def test_missing_assets_are_said_once_in_a_run(real: tuple[Path, str]) -> None:
    folder, printed = real
    assert printed.count("HPS_v2.1_compressed.pt: no such file") == 1
    assert "clip_score" in read_json(folder / "summary.json")["scores"]


def test_quick_looks_and_averages_have_names_of_their_own(real: tuple[Path, str]) -> None:
    """Half of the samples while it trains; all of them before and after, under the plain names."""
    folder, _ = real
    found = read_scores(folder / "scores.jsonl")
    plain = set(read_json(folder / "summary.json")["scores"])
    assert {"reading", "embedded_fd", "clip_score"} <= plain
    assert list(found) == [0, 5, 10, 15, 20]
    assert set(found[0]) == plain
    for step in (5, 10, 15):
        assert set(found[step]) == {f"{prefix}quick/{name}" for name in plain for prefix in ("", "ema/")}
    assert set(found[20]) == {f"{prefix}{name}" for name in plain for prefix in ("", "ema/")}
    assert read_json(folder / "summary.json")["n"]["reading"] == 8
    logged = {name for row in read_rows(folder / "metrics.csv") for name, value in row.items() if value}
    assert {"eval/quick/reading", "eval/ema/quick/reading", "eval/quick/clip_score"} <= logged


def test_a_finished_run_evaluated_again_has_the_scores_of_its_training(
    real: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Final and averaged weights, and those that joint training started from."""
    folder, _ = real
    found = read_scores(folder / "scores.jsonl")
    for arguments, step, prefix in (([], 20, ""), (["ema=true"], 20, "ema/"), (["step=0"], 0, "")):
        results = read_results(evaluate_run(compose_evaluation(["run=x", SMOKE, *arguments]), folder, print))
        assert len(results["scores"]) == 8
        for name, score in results["scores"].items():
            assert score["value"] == found[step][f"{prefix}{name}"], (name, arguments)
    summary = read_json(folder / "summary.json")
    assert summary["ema"] == {n.removeprefix("ema/"): v for n, v in found[20].items() if n.startswith("ema/")}
    assert "Averaged weights" in (folder / "summary.txt").read_text()


def test_a_run_keeps_its_words_and_the_size_of_its_images(real: tuple[Path, str], shared_tmp: Path) -> None:
    folder, _ = real
    data = shared_tmp / "data" / read_json(folder / "summary.json")["data"]
    assert (folder / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert read_json(folder / "summary.json")["image_size"] == [20, 20]


def test_a_cached_parent_is_evaluated_like_a_run(real: tuple[Path, str], shared_tmp: Path) -> None:
    summary = read_json(real[0] / "summary.json")
    parent = shared_tmp / "cache" / "stage0" / summary["parent"].split()[-1]
    folder = evaluate_run(compose_evaluation(["run=x", SMOKE]), parent, lambda line: None)
    results = read_results(folder)
    assert results["weights"] == "parent"
    measured = {name: score["value"] for name, score in results["scores"].items()}
    assert measured == summary["anchors"]["stage 0"]
    shutil.rmtree(folder)


def without_logs(run: Path, runs: Path) -> Path:
    """A copy of a run, whose report has few figures."""
    logs = shutil.ignore_patterns("evaluation", "metrics.csv", "routing", "shared_only.jsonl")
    copy = Path(shutil.copytree(run, runs / run.name, ignore=logs))
    rows = [json.loads(line) for line in (copy / SCORES).read_text().splitlines()]
    plain = [row | {"scores": {n: v for n, v in row["scores"].items() if "/" not in n}} for row in rows]
    (copy / SCORES).write_text("".join(json.dumps(row) + "\n" for row in plain if row["scores"]))
    return copy


def test_a_folder_of_runs_is_audited_measured_and_reported(
    real: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    one = without_logs(real[0], runs)
    (runs / "half").mkdir()
    (runs / "half" / "config.yaml").write_text("{}")
    assert main([f"runs={runs}", SMOKE, "only=[knowledge,reading]"]) == 0
    printed = capsys.readouterr().out
    assert "half" in printed
    (folder,) = (one / "evaluation").glob("step=*/results.json")
    assert set(read_json(folder)["protocol"]) == {"knowledge", "reading"}
    assert {"report.md", "report.html", "results.csv"} <= {path.name for path in (runs / "report").iterdir()}
    command = f"python src/eval.py runs={runs} evaluation=smoke 'only=[knowledge,reading]'"
    assert command in (runs / "report" / "report.md").read_text()
    assert str(runs / "report" / "report.html") in printed
    shutil.rmtree(one / "evaluation")
    assert main([f"runs={runs}", SMOKE, "evaluate=false", f"report={tmp_path / 'other'}"]) == 0
    assert (tmp_path / "other" / "report.html").is_file()
    assert not (one / "evaluation").exists()


def test_anchors_are_measured_like_the_end_they_are_held_against(
    real: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once where the training measured both alike, and anew where the evaluation is of other sizes."""
    runs = tmp_path / "runs"
    one = without_logs(real[0], runs)
    only = "only=[knowledge,reading]"

    def measured(*arguments: str) -> list[str]:
        """As the command does before its report; returns what failed."""
        config = compose_evaluation([f"runs={runs}", SMOKE, only, *arguments])
        return evaluate(config, audited_runs(config, runs))

    assert measured() == []
    assert not list(one.rglob("anchors.json"))
    assert len(list(one.glob("evaluation/*/results.json"))) == 1
    assert main([f"runs={runs}", SMOKE, only, "evaluation.readings=4"]) == 0
    (path,) = one.rglob("anchors.json")
    anchors = read_json(path)
    assert anchors["benchmarks"] == ["knowledge", "reading"]
    with (runs / "report" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "reading"]
    found = {(row["step"], row["source"]): float(row["n"]) for row in rows if row["source"] != "training"}
    assert found == {("stage 0", "anchor"): 4, ("iteration 0", "anchor"): 4, ("20", "evaluation"): 4}
    start = next(float(row["value"]) for row in rows if row["step"] == "iteration 0")
    assert start == anchors["iteration 0"]["reading"]["value"]
    assert anchors["unmeasured"] == []
    (one / "init.safetensors").unlink()
    capsys.readouterr()
    assert measured("evaluation.readings=5") == []
    assert "anchor not measured: iteration 0: " in capsys.readouterr().out


def test_runs_that_do_not_compare_cost_no_evaluation(
    real: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = shutil.ignore_patterns("evaluation")
    one, two = (Path(shutil.copytree(real[0], tmp_path / name, ignore=fresh)) for name in ("one", "two"))
    changed = (
        (two / "config.yaml").read_text().replace("\nseed: 0\n", "\nseed: 1\n").replace("warmup: 30", "warmup: 29")
    )
    assert "warmup: 29" in changed
    (two / "config.yaml").write_text(changed)
    assert main([f"runs={tmp_path}", SMOKE]) == 1
    error = capsys.readouterr().err
    assert "warmup" in error
    assert error.count("\n") == 1
    assert not (one / "evaluation").exists()
    assert not (tmp_path / "report").exists()
