"""The report of a factorial study: effects, verdicts about them, speed; from run folders and from rows alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from studies.studied import MADE, write_run
from symbiotic.schema import ConfigError, RunError
from symbiotic.studies import results_file
from symbiotic.studies.page import write_page
from symbiotic.studies.plan import cells_of
from symbiotic.studies.report import document_of, report_of
from symbiotic.studies.report_html import markdown
from symbiotic.studies.runs_of import read_run
from symbiotic.studies.study import Study, study_of

NODE: dict[str, Any] = {
    "name": "crossed",
    "experiment": "smoke",
    "seeds": [0, 1, 2],
    "reference": "one pool, one rate",
    "factors": ["system", "rates"],
    "design": {
        "partition": {"one pool": ["system=standard_separable"], "two pools": []},
        "rates": {"one rate": ["ablation=single_lr"], "two rates": []},
    },
    "targets": {"flow_error": 0.9},
    "logged": ["leak/all"],
    "hypotheses": [
        {"claim": "two pools read better", "metric": "reading", "effect": "partition: two pools", "expect": "higher"},
        {
            "claim": "two pools help more at two rates",
            "metric": "reading",
            "effect": "partition: two pools × rates: two rates",
            "expect": "higher",
        },
        {
            "claim": "soon",
            "metric": "steps_to/flow_error@0.9",
            "arm": "two pools, two rates",
            "against": "one pool, two rates",
            "expect": "lower",
        },
    ],
}
ROUTING = {"routing/capacity@1.25/vae": 0.8}
BETTER = {
    "one pool, one rate": 0.0,
    "one pool, two rates": 0.02,
    "two pools, one rate": -0.03,
    "two pools, two rates": 0.044,
}


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of({"study": NODE})


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose reading is that of their arm, with a row each."""
    root = tmp_path_factory.mktemp("crossed")
    for cell in cells_of(study, [], lambda overrides: pytest.fail(f"composed {overrides}")):
        overrides = [o for o in study.overrides(cell.arm) if not o.startswith(("experiment=", "name="))]
        made = write_run(
            root / "made", "x", cell.seed, overrides, BETTER[cell.arm], False, provenance=MADE, routing=ROUTING
        )
        shutil.move(made, root / cell.run)
        row = results_file.row_of(read_run(root / cell.run), cell.arm, study.logged)
        results_file.add_rows(root / results_file.FILE, [row])
    (root / "made").rmdir()
    return root


def text_of(study: Study, folder: Path) -> str:
    """The Markdown of the report, without its figures."""
    return markdown(document_of(study, folder)[1]).replace("\\", "")


@pytest.fixture(scope="module")
def text(study: Study, folder: Path) -> str:
    report_of(study, folder, folder / "report")
    return (folder / "report" / "report.md").read_text().replace("\\", "")


def test_effects_stand_in_the_report_with_their_intervals(text: str) -> None:
    section = text.split("What each factor does")[-1]
    row = next(line for line in section.splitlines() if line.startswith("| partition: two pools |"))
    # reading: ((-.03 - 0) + (.044 - .02)) / 2 = -.003, times 1, 1.1 and 1.2 by seed
    assert "| 2 pairs |" in row
    assert "**−0.003**<br><sub>[−0.004, −0.003], Holm" in row
    both = next(line for line in section.splitlines() if line.startswith("| partition: two pools × rates: two rates |"))
    assert "| capacity@1.25 ↑<br><sub>latents</sub> |" in section
    assert "| 1 quadruple | **+0.059**" in both  # ((.044 - .02) - (-.03 - 0)) * 1.1


def test_hypotheses_about_effects_have_verdicts(text: str) -> None:
    assert re.search(r"not supported.*two pools read better", text, re.IGNORECASE)
    assert re.search(r"supported.*two pools help more at two rates", text, re.IGNORECASE)
    assert "reading, effect of partition: two pools −0.0033 [−0.0040, −0.0026], 3 seeds" in text
    assert "steps to flow error 0.9 of two pools, two rates against one pool, two rates +0.0 (the same in all" in text


def test_speed_has_its_figure_and_table(text: str, folder: Path) -> None:
    assert (folder / "report" / "figures" / "speed-flow_error-0.9.png").is_file()
    assert "3 of 3 seeds" in text


def test_rows_alone_say_the_same(text: str, study: Study, folder: Path, tmp_path: Path) -> None:
    """As after the runs were made on another machine: only figures of single runs are missing."""
    shutil.copy(folder / results_file.FILE, tmp_path)
    alone = text_of(study, tmp_path)
    for title in ("Verdicts", "What each factor does", "Retention against speed"):
        assert part(alone, title) == part(text, title), title
    assert "- runs: 12\n" in alone
    assert "left out:" not in alone


def part(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_page_has_what_the_report_found_and_keeps_what_people_wrote(
    study: Study, folder: Path, text: str, tmp_path: Path
) -> None:
    page = write_page(study, folder, tmp_path / "2026-12-01-crossed")
    made = page.read_text().replace("\\", "")
    assert made.startswith("# crossed: 4 arms, 12 runs, seeds 0,1,2\n\n**Question.** ")
    assert "\nmake study STUDY=crossed\n" in made
    assert "Commit abc123; torch 2;" in made
    for title in ("Verdicts", "What each factor does", "Retention against speed"):
        assert part(made, title).strip() == part(text, title).strip(), title
    assert (page.parent / results_file.FILE).read_bytes() == (folder / results_file.FILE).read_bytes()
    figures = re.findall(r"\]\((figures/.+?)\)", made)
    assert figures
    assert all((page.parent / figure).is_file() for figure in figures)
    page.write_text(page.read_text().replace("supported", "SUPPORTED") + "\nNothing much.\n")
    before = page.read_text()
    write_page(study, folder, page.parent)
    assert page.read_text() == before.replace("SUPPORTED", "supported")
    with pytest.raises(RunError, match=r"no results\.csv; this must be the folder of a study's runs"):
        write_page(study, tmp_path)


def test_rows_of_an_arm_that_changed_are_left_out_and_said(study: Study, folder: Path, tmp_path: Path) -> None:
    rows = (folder / results_file.FILE).read_text().replace("standard_separable-", "standard_separable-f00", 1)
    (tmp_path / results_file.FILE).write_text(rows)
    assert "a row of results.csv: arm one pool, one rate is none, or another, now" in text_of(study, tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"leave_out": [{"pools": "x"}]}, r"study\.leave_out\[0\]=pools: must be one of the design's"),
        ({"leave_out": [{"rates": "x"}]}, r"study\.leave_out\[0\]\.rates=x: must be one of the design's"),
        ({"design": {"rates": {"one": []}}}, r"study\.design\.rates: must have at least two levels"),
        ({"arms": {"one pool, one rate": []}}, r"the design has an arm of that name"),
        ({"targets": {"speed": 1}}, r"study\.targets=speed: must be one of the scores"),
        (
            {"hypotheses": [NODE["hypotheses"][0] | {"effect": "partition: one pool"}]},
            r"hypotheses\[0\]\.effect=partition: one pool: must be one or two, joined by ' × ', of partition: two",
        ),
        (
            {"hypotheses": [NODE["hypotheses"][0] | {"arm": "one pool, one rate"}]},
            r"hypotheses\[0\]\.effect: stands in place of arm and against",
        ),
        (
            {"hypotheses": [NODE["hypotheses"][2] | {"metric": "steps_to/speed@1"}]},
            r"metric=steps_to/speed@1: no such score",
        ),
    ],
)
def test_a_wrong_design_is_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        study_of({"study": {**NODE, **changes}})
