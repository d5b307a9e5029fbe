"""The report of a study: what stands in it, where the numbers come from, and that the same runs give the same bytes."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from studies.studied import CAPTIONS, MADE, STEPS, N, copied, write_run, write_study
from studies.test_report_pages import Page, faults
from symbiotic.callbacks.in_loop_evaluation import read_scores
from symbiotic.evaluation.names import metric
from symbiotic.runs import digest, read_json, write_json
from symbiotic.schema import RunError
from symbiotic.studies.report import COLUMNS, document_of, report_of, results_csv, write_report
from symbiotic.studies.report_html import html
from symbiotic.studies.report_html import markdown as as_markdown
from symbiotic.studies.report_tables import number
from symbiotic.studies.study import Study, study_of

HOSTILE = "<b>|x"
BETWEEN = {"arm": HOSTILE, "against": "standard"}
STUDY = {
    "name": "made_up", "question": "Does <i>anything</i> | differ?", "experiment": "smoke", "seeds": [0, 1, 2],
    "reference": "standard", "factors": ["system", "phases", "mix"],
    "arms": {HOSTILE: [], "standard": ["system=standard_moe", "phases=none"], "und": ["mix=und_only"]},
    "hypotheses": [
        {"claim": "it knows more", "metric": "knowledge_unreplayed", "expect": "higher", **BETWEEN},
        {"claim": "it reads worse", "metric": "reading", "expect": "lower", **BETWEEN},
    ],
}  # fmt: skip
COMMAND = "python src/eval.py runs=made_up 'only=[reading]'"
SECTIONS = ("summary", "verdicts", "results", "forgetting", "curves", "routing", "samples", "audit", "provenance")


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of({"study": STUDY})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "made_up", seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def report(study: Study, runs: Path) -> Path:
    folder = runs.parent / "report"
    report_of(study, runs, folder, command=COMMAND)
    return folder


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "report.html").read_text()


@pytest.fixture(scope="module")
def markdown(report: Path) -> str:
    return (report / "report.md").read_text()


def text_of(study: Study, runs: Path, factors: list[str] | None = None) -> str:
    """The Markdown of a report, without its figures."""
    return as_markdown(document_of(study, runs, factors)[1])


def section(text: str, title: str) -> str:
    """Of the Markdown."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_page_is_one_whole_accessible_file_with_its_sections(page: str) -> None:
    assert faults(page) == []
    ids = {attributes["id"] for attributes in Page(page).of("section")}
    assert ids == {*SECTIONS, "glossary"}


def test_names_of_arms_and_captions_are_escaped(page: str, markdown: str) -> None:
    assert HOSTILE not in page
    assert "&lt;b&gt;|x" in page
    assert "<b>on</b>" not in page
    assert HOSTILE not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith(r"| &lt;b&gt;\|x")]
    assert len(rows) >= 5


def test_the_tables_of_the_markdown_are_well_formed(markdown: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(tables) >= 10
    for table in tables:
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert set(cells) == {cells[0]}
        assert re.fullmatch(r"\|( (---|---:) \|)+", table.splitlines()[1])


def test_every_figure_that_is_linked_is_there_and_holds_a_picture(report: Path, markdown: str) -> None:
    linked = re.findall(r"\]\((figures/[\w-]+\.png)\)", markdown)
    assert {Path(name).stem for name in linked} == {
        "forgetting", "frontier", "curves", "routing", "experts", "leak", "conflict", "samples",
    }  # fmt: skip
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (report / "figures").iterdir())
    for name in linked:
        with Image.open(report / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
            assert not {"date", "Software", "Creation Time"} & set(image.info)


def test_the_numbers_of_the_main_table_by_hand(runs: Path, markdown: str) -> None:
    values = {arm: [scored(runs, arm, seed)["reading"] for seed in (0, 1, 2)] for arm in ("symbiotic", "standard_moe")}
    mean = sum(values["symbiotic"]) / 3
    sd = math.sqrt(sum((value - mean) ** 2 for value in values["symbiotic"]) / 2)
    row = next(line for line in section(markdown, "Results").splitlines() if line.startswith(r"| &lt;b&gt;\|x"))
    assert f"{mean:.3f} ± {sd:.3f}" in row
    anchors = [
        line.split(" | ")[0]
        for line in section(markdown, "Results").splitlines()
        if "stage 0" in line or "iteration 0" in line
    ]
    assert anchors[:2] == ["| stage 0", "| iteration 0<br><sub>of &lt;b&gt;\\|x</sub>"]


def evaluated(runs: Path, arm: str, seed: int) -> dict[str, Any]:
    return read_json(next(runs.glob(f"{arm}-0a1b2c3d-seed{seed}/evaluation/*/results.json")))


def scored(runs: Path, arm: str, seed: int) -> dict[str, float]:
    return {name: score["value"] for name, score in evaluated(runs, arm, seed)["scores"].items()}


def test_distances_have_an_interval_from_their_samples_over_all_seeds(markdown: str) -> None:
    """Half widths of 9 in each of three seeds: 9 / sqrt 3 around the mean, 51."""
    generation = section(markdown, "Results").split("*Generation")[1]
    assert "Resampled: 95 % interval of the mean by the images drawn" in generation
    assert "| 51.0 ± 1.0<br><sub>reference; resampled 45.8 to 56.2</sub> |" in generation


def test_a_seed_without_a_number_is_said_at_the_cell_and_among_the_problems(
    study: Study, runs: Path, tmp_path: Path
) -> None:
    root = copied(runs, tmp_path / "runs")
    path = next(root.glob("standard_moe-0a1b2c3d-seed1/evaluation/*/results.json"))
    results = read_json(path)
    results["scores"]["reading"]["value"] = None
    write_json(path, results)
    text = text_of(study, root)
    row = next(line for line in section(text, "Results").splitlines() if line.startswith("| standard<"))
    assert "<br><sub>reference; n 2 of 3 seeds</sub>" in row
    assert row.count("of 3 seeds") == 1
    line = "no number for reading: standard, seed 1; its means are over the others"
    assert line in section(text, "Summary")
    assert line in section(text, "Audit")
    assert "No run of the study is missing" not in text


def test_averages_and_quick_looks_are_on_their_side_and_no_part_of_a_benchmark(tmp_path: Path) -> None:
    root = tmp_path / "made_up"
    for seed in (0, 1):
        path = write_run(root, "symbiotic", seed) / "scores.jsonl"
        known = {f"{prefix}flow_error": 1.0 for prefix in ("ema/", "quick/", "ema/quick/")}
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [json.dumps(line | {"scores": line["scores"] | known}) for line in lines]
        path.write_text("\n".join(rows) + "\n")
    data, made = document_of(Study(), root)
    text = as_markdown(made)
    assert "flow error" in section(text, "Results")
    assert "averaged weights" not in section(text, "Results")
    assert "ema/" not in section(text, "Summary")
    table = pd.read_csv(io.StringIO(results_csv(data)))
    assert set(table[table.score == "ema/flow_error"].better) == {"lower"}
    facts = metric("ema/quick/flow_error")
    assert (facts.side, facts.better) == ("generation", "lower")
    assert facts.title == "flow error, a share of the samples, averaged weights"


def test_equal_ends_are_said_once(tmp_path: Path) -> None:
    root = tmp_path / "made_up"
    for arm, more in (("symbiotic", ()), ("standard_moe", ("system=standard_moe", "phases=none"))):
        write_run(root, arm, 0, more)
    said = section(text_of(Study(), root, ["system", "phases"]), "Summary")
    assert "Reading ends at 0.850 in all arms, from 0.900 at stage 0." in said
    assert "ends between" not in said


def test_official_scores_come_first_and_parts_of_benchmarks_have_a_table_of_their_own(page: str, markdown: str) -> None:
    results = section(markdown, "Results")
    assert results.split("\n|")[1].startswith(" arm | OCRBench ↑<br><sub>n 1000</sub> | knowledge, not replayed ↑")
    assert "| 401 ± 1<br><sub>reference</sub> |" in results
    parts = results.split("### Parts of the understanding benchmarks")[1]
    assert "| OCRBench: text recognition ↑<br><sub>n 300</sub> | 101 ± 1 | 101 ± 1 | 101 ± 1 |" in parts
    assert "<summary>Parts of the understanding benchmarks</summary>" in page


def test_numbers_have_a_sign_a_minus_and_no_negative_zero() -> None:
    assert [number(v, 2, True) for v in (0.016, -0.016, -0.001, 0.0)] == ["+0.02", "−0.02", "0.00", "0.00"]
    assert number(-0.5, 1) == "−0.5"


def test_image_scores_of_an_arm_that_makes_no_images_are_dashes(markdown: str) -> None:
    generation = section(markdown, "Results").split("*Generation")[1]
    row = next(line for line in generation.splitlines() if line.startswith("| und"))
    assert re.findall(r"\| ([^|]*) ", row.split("</sub>", 1)[1]) == ["–"] * 3


def test_verdicts_stand_above_the_evidence_and_in_the_summary(markdown: str) -> None:
    verdicts = section(markdown, "Verdicts")
    assert re.search(r"\*\*supported\*\*: it knows more<br><sub>knowledge, not replayed of .* \+0\.0550 ", verdicts)
    assert "**not supported**: it reads worse" in verdicts
    assert "from 0.910 at stage 0" in section(markdown, "Summary")
    assert "Of 2 hypotheses: 1 supported, 1 not supported, 0 undecided." in section(markdown, "Summary")


def test_what_was_not_measured_says_which_file_and_where(page: str, markdown: str) -> None:
    rows = section(markdown, "Results")
    assert "| fid | not measured | coco/captions_val2014.json: no such file; looked for" in rows
    assert "| mmlu | failed | anatomy_test.csv: line 3: the answer must be A, B, C or D, not E | 9 |" in rows
    assert "reading: image 7: not a readable image (9 runs)" in rows
    assert "Not measured: fid, mmlu" in section(markdown, "Summary")
    assert "SYMBIOTIC_ASSETS/coco" in page


def test_the_judges_and_the_glossary_stand_beside_the_scores(markdown: str) -> None:
    assert "| classifier | 0.980 |" in section(markdown, "Results")
    terms = section(markdown, "What the scores are")
    assert "**knowledge, not replayed (knowledge_unreplayed)**" in terms
    assert "chance 0.25; n 40." in terms
    assert "none of them is MMLU, OCRBench, CLIP score or FID" in terms


def test_images_stand_beside_their_captions(page: str) -> None:
    images = [a for a in Page(page).of("img") if a["alt"].endswith(CAPTIONS[1])]
    assert [a["alt"] for a in images] == [f"{HOSTILE}: {CAPTIONS[1]}", f"standard: {CAPTIONS[1]}"]


def test_the_audit_lists_keys_costs_and_provenance(markdown: str) -> None:
    audit, origin = section(markdown, "Audit"), section(markdown, "Provenance")
    assert re.search(r"\| system\.name<br><sub>architecture</sub> \| system \| standard_moe \| symbiotic \|", audit)
    assert re.search(r"\| und \|( [\d,.]+ \|){12,}", audit)
    assert COMMAND in origin
    assert origin.count("-0a1b2c3d-seed") == 9
    assert MADE["commit"] in origin


def test_the_csv_holds_every_number_of_the_runs(runs: Path, report: Path) -> None:
    table = pd.read_csv(report / "results.csv")
    assert tuple(table.columns) == COLUMNS
    assert set(table.arm) == {HOSTILE, "standard", "und"}
    one = table[(table.arm == "standard") & (table.seed == 1)]
    trained = {(row.step, row.score): row.value for row in one[one.source == "training"].itertuples()}
    folder = runs / "standard_moe-0a1b2c3d-seed1"
    scores = read_scores(folder / "scores.jsonl")
    assert trained == {(str(step), name): value for step in STEPS for name, value in scores[step].items()}
    evaluation = one[one.source == "evaluation"].set_index("score")
    assert evaluation.value.to_dict() == scored(runs, "standard_moe", 1)
    assert evaluation.n.to_dict() == N
    assert set(evaluation.protocol) == {digest(evaluated(runs, "standard_moe", 1)["protocol"])}
    assert set(one[one.source == "anchor"].step) == {"stage 0", "iteration 0"}
    assert set(table.code) == {MADE["code"]}


def test_the_same_runs_give_the_same_bytes(study: Study, runs: Path, report: Path) -> None:
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    made = report_of(study, runs, report, command=COMMAND)
    assert {path: path.read_bytes() for path in made} == before


def test_one_seed_has_no_interval_and_no_verdict(study: Study, tmp_path: Path) -> None:
    root = write_study(tmp_path / "made_up", seeds=(1,))
    _, made = document_of(study_of({"study": STUDY | {"seeds": [1]}}), root)
    text = as_markdown(made)
    assert "There is one seed: no deviation, no interval, and no verdict." in section(text, "Summary")
    assert "±" not in section(text, "Results")
    assert "[" not in section(text, "Forgetting and interference").replace("![", "")
    assert "resampled" in section(text, "Results")
    verdicts = section(text, "Verdicts")
    assert "One seed: there is no interval, so no verdict." in verdicts
    assert not re.search("supported|undecided|interval .*[0-9]", verdicts.replace("so no interval", ""))
    assert faults(html(made)) == []


def test_an_arm_whose_alarm_intervened_is_marked(tmp_path: Path) -> None:
    root = write_study(tmp_path / "made_up", seeds=(0,))
    folder = root / "symbiotic-0a1b2c3d-seed0"
    write_json(folder / "summary.json", read_json(folder / "summary.json") | {"events": {"intervention": 2}})
    write_report(root, "none", ["system", "phases", "mix"], root / "report", None)
    text = (root / "report" / "report.md").read_text()
    assert text.count("⚠ its alarm intervened (seed 0)") >= 3
    page = Page((root / "report" / "report.html").read_text())
    marked = [a["alt"] for a in page.of("img") if "symbiotic" in a["alt"] and "standard_moe" not in a["alt"]]
    assert len([alt for alt in marked if "⚠" in alt]) > len(CAPTIONS)
    assert "the collapse alarm changed the training" in section(text, "Summary")


def test_runs_without_evaluation_logs_and_images_make_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    root = tmp_path / "made_up"
    for seed in (0, 1):
        folder = write_run(root, "symbiotic", seed, evaluated=False)
        for name in ("metrics.csv", "routing/step=000020.npz"):
            (folder / name).unlink()
    report_of(Study(), root, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "There are no images." in text
    assert "- date: 1970-01-02\n" in text
    assert faults((tmp_path / "report" / "report.html").read_text()) == []


def test_two_evaluations_of_one_run_are_refused_and_nothing_is_written(runs: Path, tmp_path: Path) -> None:
    root = copied(runs, tmp_path / "runs")
    evaluation = next(root.glob("und_only-*-seed0/evaluation/*"))
    copied(evaluation, evaluation.with_name("step=000020-11111111"))
    with pytest.raises(RunError, match=r"several evaluations of its last step \(step=000020-0f0f0f0f, step=000020-1"):
        report_of(Study(), root, tmp_path / "report")
    assert not (tmp_path / "report").exists()
