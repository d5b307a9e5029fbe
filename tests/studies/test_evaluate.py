"""One evaluation of a run: what it writes, what it is found by, what it says when something is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assets import write_assets, write_clip
from inspected import run_folder
from symbiotic.checks.evaluation import EMBEDDED
from symbiotic.config import compose_evaluation
from symbiotic.evaluation import prompts
from symbiotic.evaluation.assets import ASSETS
from symbiotic.evaluation.context import whole_lines
from symbiotic.evaluation.embedded import EmbeddedEvaluation
from symbiotic.evaluation.embedded_understanding import Reading
from symbiotic.evaluation.images import image_facts, load_image
from symbiotic.runs import load_state, save_state
from symbiotic.schema import ConfigError, EvalConfig, RunError
from symbiotic.studies.benchmarks import benchmark_names
from symbiotic.studies.evaluate import evaluate_run, evaluation_folder, read_results
from symbiotic.studies.evaluation_command import notes
from symbiotic.trained import open_run

CLIP = "++evaluation.benchmarks.clip_score={_target_: symbiotic.evaluation.clip_score.CLIPScore, num_images: 3"


@pytest.fixture(scope="module")
def trained(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_folder(shared_tmp, folder, "objective.sampler.steps=2")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


OF_FLOW = tuple(name for name in EMBEDDED if name != "image_ce")
"""The embedded benchmarks of a run with the objective flow."""


def config(*overrides: str) -> EvalConfig:
    return compose_evaluation(["run=unread", "evaluation=smoke", *overrides])


def quiet(line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an evaluation, but the times that it took."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seconds.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def scores(results: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: score["value"] for name, score in results["scores"].items()}


def test_scores_are_those_of_the_benchmarks_and_rest_on_kept_records(run: Path) -> None:
    folder = evaluate_run(config(), run, quiet)
    results = read_results(folder)
    assert folder.parent == run / "evaluation"
    assert folder.name.startswith("step=000020-")
    opened, smoke = open_run(run), config().evaluation
    direct = EmbeddedEvaluation(opened.corpus, smoke, opened.config.objective, "tiny").run(opened.model, 0)
    assert scores(results) == dict(direct)
    assert {name: score["n"] for name, score in results["scores"].items()} == direct.n
    assert results["judges"] == direct.judges
    records = {path.stem: list(whole_lines(path)) for path in folder.glob("*.jsonl")}
    kept = ("knowledge_replayed", "knowledge_unreplayed", "reading", "flow_error", "generation")
    assert direct.records == [record for name in kept for record in records[name]]
    images = sorted((folder / "images" / "embedded").glob("*.png"))
    assert len(images) == 8
    assert image_facts(images[0])["sampler"] == "euler, 2 steps, time shift 1"
    assert load_image(folder / "grid.png").shape[1] == 4 * 240
    assert set(json.loads((folder / "seconds.json").read_text())) == {"start-up", *OF_FLOW}


def test_results_say_what_they_rest_on(run: Path) -> None:
    provenance = {"code": "c", "commit": "d"}
    (run / "summary.json").write_text(json.dumps({"provenance": provenance, "parent": "stage 0 x"}))
    results = read_results(evaluate_run(config("only=[knowledge]"), run, quiet))
    facts = ("run", "weights", "step", "ema", "seed", "missing", "failed", "problems")
    expected = ["run", "step=000020", 20, False, 0, {}, {}, []]
    assert [results[key] for key in facts] == expected
    assert results["protocol"] == {"knowledge": {"questions": 8, "shots": 0, "score": "argmax over the letters"}}
    assert results["data"] == open_run(run).corpus.name
    assert results["device"] == "cpu"
    assert set(results["versions"]) == {"torch", "numpy", "pillow"}
    assert results["provenance"]["training"] == provenance
    assert {"code", "commit", "torch"} <= set(results["provenance"]["evaluation"])
    assert results["scores"]["knowledge_replayed"] | {"value": 0} == {
        "value": 0, "n": 8, "low": None, "high": None, "benchmark": "knowledge"
    }  # fmt: skip


def test_what_is_measured_is_not_measured_again_and_again_would_be_the_same(run: Path) -> None:
    folder, said = evaluate_run(config(), run, quiet), list[str]()
    first = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert evaluate_run(config(), run, said.append) == folder
    assert said == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == times
    shutil.rmtree(folder)
    assert evaluate_run(config(), run, said.append) == folder
    assert len(said) == 4
    assert contents(folder) == first


def test_one_benchmark_after_the_other_gives_the_same_files(run: Path) -> None:
    folder = evaluate_run(config(), run, quiet)
    whole = contents(folder)
    shutil.rmtree(folder)
    for name in reversed(OF_FLOW):
        assert evaluate_run(config(f"only=[{name}]"), run, quiet) == folder
    assert contents(folder) == whole


@pytest.mark.parametrize(
    "other",
    [
        ("seed=1",),
        ("sampler.steps=3",),
        ("sampler.guidance=1",),
        ("sampler.time_shift=2",),
        ("evaluation.images=4",),
        ("evaluation.questions=8",),
        ("evaluation.caption_tokens=9",),
        ("step=10",),
    ],
)
def test_what_decides_the_scores_has_a_folder_of_its_own(trained: Path, other: tuple[str, ...]) -> None:
    assert evaluation_folder(config(*other), trained) != evaluation_folder(config(), trained)
    assert evaluation_folder(config("threads=2", "only=[reading]", "seed=0"), trained) == evaluation_folder(
        config(), trained
    )


def test_weights_trained_anew_are_evaluated_anew(run: Path) -> None:
    before = evaluation_folder(config(), run)
    state = load_state(run / "model.safetensors")
    save_state(run / "model.safetensors", {name: value + 1e-3 for name, value in state.items()})
    assert evaluation_folder(config(), run) != before


def test_the_sampler_of_the_config_draws_the_images(run: Path) -> None:
    folder = evaluate_run(config("sampler.steps=1", "sampler.guidance=0", "only=generation"), run, quiet)
    facts = image_facts(next((folder / "images" / "embedded").glob("*.png")))
    assert (facts["sampler"], facts["guidance"]) == ("euler, 1 steps, time shift 1", "0")
    assert read_results(folder)["sampler"].items() >= {"steps": 1, "guidance": 0.0, "time_shift": 1.0}.items()


def test_which_weights_are_measured(run: Path) -> None:
    half = {name: value / 2 for name, value in load_state(run / "model.safetensors").items()}
    save_state(run / "ema.safetensors", half)
    only = "only=knowledge"
    found = {
        "step=000020": read_results(evaluate_run(config(only), run, quiet)),
        "step=000010": read_results(evaluate_run(config(only, "step=10"), run, quiet)),
        "step=000000": read_results(evaluate_run(config(only, "step=0"), run, quiet)),
        "ema": read_results(evaluate_run(config(only, "ema=true"), run, quiet)),
    }
    assert [results["weights"] for results in found.values()] == list(found)
    assert [results["step"] for results in found.values()] == [20, 10, 0, 20]
    assert [results["ema"] for results in found.values()] == [False, False, False, True]
    assert len({results["weights_hash"] for results in found.values()}) == 4
    same = run / "checkpoints" / "step=000010.ckpt"
    assert evaluation_folder(config(only, f"checkpoint={same}"), run) == evaluation_folder(config(only, "step=10"), run)
    copy = shutil.copy(run / "model.safetensors", run / "my best.safetensors")
    name = evaluation_folder(config(only, f"checkpoint={copy}"), run).name
    assert name.startswith("my_best-")


def test_a_parent_is_asked_and_draws_nothing(run: Path) -> None:
    """Its config has no generation pool; it draws no images, so the benchmarks about them are left out."""
    state = load_state(run / "model.safetensors")
    silent = {name: value for name, value in state.items() if not name.startswith(("latent", "time_in"))}
    save_state(run / "model.safetensors", silent)
    results = read_results(evaluate_run(config(), run, quiet))
    assert set(scores(results)) == {"knowledge_replayed", "knowledge_unreplayed", "reading"}
    assert results["missing"] == {}


# --------------------------------------------------------------------------- what is missing or cannot be used


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ASSETS, str(tmp_path / "assets"))
    return tmp_path / "assets"


def test_a_missing_asset_is_a_line_and_changes_nothing_else(run: Path, assets: Path) -> None:
    plain = evaluate_run(config(), run, quiet)
    folder = evaluate_run(config(CLIP + "}"), run, quiet)
    assert folder == plain
    results = read_results(folder)
    assert list(results["missing"]) == ["clip_score"]
    assert "coco/captions_val2014.json" in results["missing"]["clip_score"]
    assert f"SYMBIOTIC_ASSETS={assets}" in results["missing"]["clip_score"]
    assert len(results["scores"]) == 8


def test_an_asset_that_came_is_measured(run: Path, assets: Path) -> None:
    before = evaluate_run(config(CLIP + "}"), run, quiet)
    write_assets(assets, images=4)
    folder = evaluate_run(config(CLIP + "}"), run, quiet)
    assert folder != before
    results = read_results(folder)
    assert results["missing"] == {}
    assert results["scores"]["clip_score"]["n"] == 3
    assert results["scores"]["clip_score"]["value"] == pytest.approx(100 * results["scores"]["clip_cosine"]["value"])
    assert scores(results).items() > scores(read_results(before)).items()
    sets = sorted(path.name for path in (folder / "images").iterdir())
    assert len(sets) == 2
    assert len(load_image(folder / "grid.png")) > len(load_image(before / "grid.png"))


def test_what_an_earlier_evaluation_made_is_taken_over(
    run: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records and images, where all that decides them is the same; the files are then those made from nothing."""
    few = (CLIP + "}", "evaluation.questions=4")
    fresh = Path(shutil.copytree(run, run.parent / "fresh" / "run"))
    evaluate_run(config(*few), run, quiet)
    write_assets(assets, images=4)
    expected = contents(evaluate_run(config(*few), fresh, quiet))
    made: list[str] = []
    draw = prompts.sample_latents
    monkeypatch.setattr(prompts, "sample_latents", lambda *args: made.append("batch") or draw(*args))
    folder = evaluate_run(config(*few), run, quiet)
    assert contents(folder) == expected
    assert made == ["batch"]  # of the new benchmark
    evaluate_run(config(*few, "seed=1"), run, quiet)
    assert len(made) == 3


def test_a_corrupt_benchmark_fails_alone_and_is_tried_again(run: Path, assets: Path) -> None:
    write_assets(assets, images=4)
    captions = assets / "coco" / "captions_val2014.json"
    good = captions.read_text()
    captions.write_text("{")
    results = read_results(evaluate_run(config(CLIP + "}"), run, quiet))
    assert list(results["failed"]) == ["clip_score"]
    assert "captions_val2014.json" in results["failed"]["clip_score"]
    assert len(results["scores"]) == 8
    captions.write_text(good)
    assert read_results(evaluate_run(config(CLIP + "}"), run, quiet))["failed"] == {}


@pytest.mark.parametrize("method", ["run", "protocol"])
def test_an_error_that_nobody_foresaw_is_one_benchmarks_and_keeps_its_traceback(
    run: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: Any) -> Any:
        return [EMBEDDED[5 + len(str(run))]]

    whole = contents(evaluate_run(config(), run, quiet))
    shutil.rmtree(run / "evaluation")
    with monkeypatch.context() as patched:
        patched.setattr(Reading, method, broken)
        folder = evaluate_run(config(), run, quiet)
    results = read_results(folder)
    place = "suite.py" if method == "run" else "benchmarks.py"  # the last one of the package itself
    assert list(results["failed"]) == ["reading"]
    assert results["failed"]["reading"].startswith(f"IndexError: tuple index out of range ({place}:")
    assert results["failed"]["reading"].endswith("; whole in errors/reading.txt")
    assert "return [EMBEDDED[5 +" in (folder / "errors" / "reading.txt").read_text()
    assert len(results["scores"]) == 7
    again = evaluate_run(config(), run, quiet)
    assert contents(again) == whole


def test_what_is_left_out_is_counted_also_of_a_benchmark_that_fails(run: Path, assets: Path) -> None:
    write_assets(assets, images=4)
    captions = assets / "some.jsonl"
    captions.write_text('{"caption": "red 7"}\n{"caption": 5}\n[\n')
    more = CLIP + f", captions: {captions}}}"
    (assets / "clip" / "open_clip_model.safetensors").write_bytes(b"cut")
    results = read_results(evaluate_run(config(more), run, quiet))
    assert list(results["failed"]) == ["clip_score"]
    assert results["left_out"] == {"clip_score": 2}
    assert [line.split(": ")[1] for line in results["problems"]] == ["line 2", "line 3"]
    assert "left out: clip_score 2" in notes(results, {}, run)
    write_clip(assets / "clip2", 1)
    (assets / "clip2" / "open_clip_model.safetensors").replace(assets / "clip" / "open_clip_model.safetensors")
    results = read_results(evaluate_run(config(more), run, quiet))
    assert (results["failed"], results["left_out"]) == ({}, {"clip_score": 2})


def test_without_its_corpus_a_run_is_asked_what_needs_none(run: Path, assets: Path, tmp_path: Path) -> None:
    write_assets(assets, images=4)
    corpus = open_run(run).corpus
    shutil.copy(corpus / "tokenizer.json", run)
    moved = (run / "config.yaml").read_text().replace(str(corpus.parent), str(tmp_path / "nothing"))
    (run / "config.yaml").write_text(moved)
    (run / "summary.json").write_text(json.dumps({"image_size": [8, 12]}))
    folder = evaluate_run(config(CLIP + "}"), run, quiet)
    results = read_results(folder)
    assert set(scores(results)) == {"clip_score", "clip_cosine"}
    assert list(results["missing"]) == list(OF_FLOW)
    assert all(str(tmp_path / "nothing" / corpus.name) in line for line in results["missing"].values())
    assert load_image(next((folder / "images").rglob("*.png"))).shape == (8, 12, 3)
    with pytest.raises(RunError, match=r"tokenizer\.json: no such file"):
        evaluate_run(config(f"data={tmp_path / 'else'}"), run, quiet)
    (run / "tokenizer.json").unlink()
    with pytest.raises(RunError, match="data=FOLDER says where the corpus lies"):
        evaluate_run(config(), run, quiet)


def test_the_runs_own_words_are_preferred(run: Path) -> None:
    corpus = open_run(run).corpus
    shutil.copy(corpus / "tokenizer.json", run)
    assert open_run(run).tokenizer.encode("red") == open_run(run, data=str(corpus.parent)).tokenizer.encode("red")
    (run / "tokenizer.json").write_text("{")
    with pytest.raises(Exception, match=str(run / "tokenizer.json")):
        open_run(run)


def test_litter_of_a_killed_write_is_swept(run: Path) -> None:
    folder = evaluate_run(config(), run, quiet)
    whole = contents(folder)
    for name in (".results.json.123", ".reading.jsonl.9.part", "images/embedded/.00001.png.part"):
        (folder / name).write_text("half")
    evaluate_run(config(), run, quiet)
    assert contents(folder) == whole


def test_a_damaged_part_is_measured_again(run: Path) -> None:
    folder = evaluate_run(config(), run, quiet)
    before = contents(folder)
    part = folder / "parts" / "reading.json"
    part.write_bytes(part.read_bytes()[:9])
    assert contents(evaluate_run(config(), run, quiet)) == before


def test_an_evaluation_that_never_ended_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such results"):
        read_results(tmp_path)


def test_judges_are_trained_with_a_line_and_only_where_images_are_judged(run: Path, tmp_path: Path) -> None:
    corpus = open_run(run).corpus
    shutil.copytree(corpus, tmp_path / "data" / corpus.name, ignore=shutil.ignore_patterns("scorers"))
    elsewhere, said = f"data={tmp_path / 'data'}", list[str]()
    folder = evaluate_run(config(elsewhere, "only=[reading]"), run, said.append)
    assert said == ["   reading …"]
    assert not (tmp_path / "data" / corpus.name / "scorers").exists()
    assert "measuring generation trains them" in read_results(folder)["missing"]["generation"]
    said.clear()
    folder = evaluate_run(config(elsewhere, "only=[generation]"), run, said.append)
    assert said == ["   the judges of images (tiny) are trained, once a corpus …", "   generation …"]
    assert "embedded_acc" in read_results(folder)["scores"]


def test_benchmarks_are_asked_for_by_key_or_by_name() -> None:
    """Of HPSv2.1 they differ: the anchors ask by the names that the results hold."""
    official = config("evaluation=official").evaluation
    assert benchmark_names(official, ("hps_v2", "reading")) == benchmark_names(official, ("hps_v2.1", "reading"))
    assert benchmark_names(official, ("hps_v2.1",)) == {"hps_v2.1"}


def test_two_of_the_same_benchmark_are_refused() -> None:
    twice = config(CLIP + "}", CLIP.replace("clip_score=", "other=") + "}")
    with pytest.raises(ConfigError, match=r"benchmarks\.other: measures clip_score as evaluation\.benchmarks\.clip_sc"):
        benchmark_names(twice.evaluation, ())
    node = {"_target_": "symbiotic.evaluation.embedded_pictures.FlowError", "folder": "x", "images": 1}
    embedded = replace(config().evaluation, benchmarks={"r": node})
    with pytest.raises(ConfigError, match=r"benchmarks\.r: measures flow_error as the embedded one does"):
        benchmark_names(embedded, ())


def test_names_of_keys() -> None:
    hps = "++evaluation.benchmarks.hps={_target_: symbiotic.evaluation.hps.HPSv2}"
    evaluation = config(hps).evaluation
    assert benchmark_names(evaluation, ("hps", "reading")) == {"hps_v2.1", "reading"}
    assert benchmark_names(evaluation, ()) == {"hps_v2.1", *EMBEDDED}


def test_the_embedded_names_are_those_of_the_suite(trained: Path) -> None:
    opened = open_run(trained)
    suite = EmbeddedEvaluation(opened.corpus, config().evaluation, opened.config.objective, "tiny")
    assert tuple(benchmark.name for benchmark in suite.benchmarks) == OF_FLOW
