"""The whole official path of `src/eval.py`, offline, on a folder of tiny assets: one run, its anchors, the report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from assets import TINY, register_tiny, write_assets
from symbiotic import arc
from symbiotic.config import compose
from symbiotic.evaluation.assets import ASSETS
from symbiotic.runs import read_json
from symbiotic.studies.evaluation_command import main

SUBJECTS = ("anatomy", "virology")


def write_questions(folder: Path) -> None:
    """Two subjects of MMLU, two shots each; OCRBench with images of several modes; two GenEval prompts."""
    from PIL import Image

    (folder / "mmlu").mkdir()
    for subject in SUBJECTS:
        for split, count in (("dev", 2), ("test", 3)):
            rows = [[f'{subject} {i}, "what" is it ?', "None", "NA", "red", "ünlü", "ABCD"[i]] for i in range(count)]
            with (folder / "mmlu" / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    images = folder / "ocrbench" / "OCRBench_Images"
    images.mkdir(parents=True)
    entries = []
    for number, mode in enumerate(("RGB", "P", "L", "RGBA", "CMYK")):
        name = f"{number}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (37, 50)).save(images / name)
        facts = {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "id": number}
        entries.append({**facts, "image_path": name, "question": "what number is it ?", "answers": ["4 7"]})
    (folder / "ocrbench" / "OCRBench.json").write_text(json.dumps(entries))
    prompts = [{"tag": "single_object", "include": [], "prompt": f"a photo of {i}"} for i in range(2)]
    (folder / "geneval").mkdir()
    (folder / "geneval" / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, prompts)))


def test_the_official_path_with_anchors_and_a_report(
    shared_tmp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = write_assets(tmp_path / "assets", images=6)
    write_questions(assets)
    monkeypatch.setenv(ASSETS, str(assets))
    register_tiny()
    runs = tmp_path / "runs"
    cache = tmp_path / "cache"
    shutil.copytree(shared_tmp / "cache", cache) if (shared_tmp / "cache").is_dir() else cache.mkdir()
    paths = [f"paths.runs={runs}", f"paths.data={shared_tmp / 'data'}", f"paths.cache={cache}"]
    config = compose(["experiment=smoke", *paths])
    arc.run(config)
    sizes = ["num_images=6", "kid_subset_size=3", "kid_subsets=2", "splits=2", f"extractor={TINY}", "reference_size=20"]
    arguments = [f"runs={runs}", "evaluation.questions=8", "evaluation.readings=4", "evaluation.images=8"]
    arguments += ["evaluation.scorers=tiny", "evaluation.batch_size=16"]
    arguments += [f"evaluation.benchmarks.fid.{size}" for size in sizes] + ["evaluation.benchmarks.mmlu.shots=2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "not measured: wise" in printed  # whose files are not there; the rest was measured
    (folder,) = (Path(config.run_dir) / "evaluation").glob("step=000020-*")
    results = read_json(folder / "results.json")
    expected = {
        "mmlu_share",
        "mmlu_share_macro",
        "ocrbench_share",
        f"fid@{TINY}",
        f"kid@{TINY}",
        "clip_score",
        "hps_v2.1",
        "reading",
    }
    assert expected <= set(results["scores"])
    assert not {"mmlu", "ocrbench", "fid"} & set(
        results["scores"]
    )  # a linear map is no Inception; five entries are not the official thousand
    assert {"wise", "dpg_bench", "t2i_compbench", "ocrbench_v2", "geneval"} == set(results["missing"])
    assert "evaluate_images.py" in results["missing"]["geneval"]  # exported; its evaluator's results are awaited
    assert (folder / "exports" / "geneval" / "00001" / "samples").is_dir()
    assert results["scores"]["mmlu_share"]["n"] == 6
    assert results["scores"]["ocrbench_share"]["n"] == 5
    anchors = read_json(folder / "anchors.json")
    assert {"mmlu_share", "ocrbench_share", f"fid@{TINY}", "clip_score"} <= set(anchors["iteration 0"])
    assert {"mmlu_share", "ocrbench_share", "reading"} <= set(
        anchors["stage 0"]
    )  # reading: of fewer than in the training
    assert not {f"fid@{TINY}", "clip_score"} & set(anchors["stage 0"])  # draws nothing
    with (runs / "report" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "mmlu_share"]
    assert {row["step"]: row["source"] for row in rows} == {
        "stage 0": "anchor",
        "iteration 0": "anchor",
        "20": "evaluation",
    }
    page = (runs / "report" / "report.md").read_text()
    assert "| wise |" in page
    assert "MMLU" in page
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and path.name != "seconds.json"}
    assert main(arguments) == 0
    after = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file() and path.name != "seconds.json"}
    assert {str(path) for path in before if before[path] != after.get(path)} == set()
    assert set(after) == set(before)
