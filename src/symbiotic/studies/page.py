"""The page of a study in `experiments/`, from its run folders: `python -m symbiotic.studies.page runs/NAME [FOLDER]`.

A short form of the report: question, command, conditions, verdicts, scores, effects, figures, and a copy of the rows.
What people wrote, everything from "## What it says" on, is kept when the page is made again.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from symbiotic.files import write_bytes
from symbiotic.schema import ConfigError, RunError
from symbiotic.studies import ledger, results_file
from symbiotic.studies.experiments import FOLDER, index
from symbiotic.studies.report import date_of, document_of, drawings
from symbiotic.studies.report_data import StudyData
from symbiotic.studies.report_document import Block, Document, Folded, Section
from symbiotic.studies.report_html import markdown
from symbiotic.studies.report_style import png
from symbiotic.studies.report_tables import counted
from symbiotic.studies.study import Study, read_study

SAID = "## What it says"
SECTIONS = ("verdicts", "results", "factors", "forgetting", "speed", "curves", "routing", "samples", "audit")
"""Of the report, in the order of the page."""


def write_page(study: Study, runs: Path, folder: Path | None = None) -> Path:
    """The page, its figures and `results.csv`; in `experiments/` the index of all pages too.

    Args:
        runs: the folder of the study's runs, with its `results.csv`.
        folder: of the page; default: `experiments/DATE-NAME`.

    Raises:
        ConfigError, RunError: runs that cannot stand in one report; nothing is written then.
    """
    if not (runs / results_file.FILE).is_file():
        raise RunError(f"{runs}: no {results_file.FILE}; this must be the folder of a study's runs, as runs/systems")
    data, whole = document_of(study, runs, trained=True)
    folder = folder or FOLDER / f"{date_of(data)}-{study.name}"
    page = folder / "README.md"
    kept = page.read_text(encoding="utf-8").partition(SAID) if page.is_file() else ("", "", "")
    document = shortened(whole)
    body = markdown(document).partition("\n## ")
    text = "\n".join([*head(study, data, runs), f"## {body[2]}"]) + "\n" + SAID + (kept[2] or "\n")
    for name, picture in drawings(document, {arm.shown: arm.look for arm in data.arms}).items():
        write_bytes(folder / "figures" / f"{name}.png", png(picture))
    write_bytes(folder / results_file.FILE, (runs / results_file.FILE).read_bytes())
    write_bytes(page, text.encode())
    if folder.parent.resolve() == FOLDER:
        write_bytes(FOLDER / "README.md", index().encode())
    return page


def shortened(whole: Document) -> Document:
    """The sections of a page, without what the report folds away."""
    found = {section.id: section for section in whole.sections if section.id in SECTIONS}
    sections = [Section(s.id, s.title, short(s.blocks)) for name in SECTIONS if (s := found.get(name))]
    return Document(whole.title, {}, [section for section in sections if section.blocks], whole.legend)


def short(blocks: Sequence[Block]) -> list[Block]:
    return [block for block in blocks if not isinstance(block, Folded)]


def head(study: Study, data: StudyData, runs: Path) -> list[str]:
    """Title, question, command, conditions."""
    facts = [run.summary["provenance"] for run in data.runs]
    commits, torch = sorted({f["commit"] for f in facts}), sorted({f["torch"] for f in facts})
    seeds, spent = ",".join(map(str, data.seeds)), ledger.hours(ledger.read(runs))
    arguments = f' ARGS="seed={seeds}"' if data.seeds != sorted(study.seeds) else ""
    expected = len(study.arms) * len(data.seeds)
    some = "" if len(data.runs) == expected else f" of {expected}"
    cost = (
        f"{spent:.1f} hours of one process each, failed and interrupted ones included"
        if spent
        else "hours not recorded"
    )
    rows = f"[{results_file.FILE}]({results_file.FILE})"
    return [
        f"# {study.name}: {counted(len(data.arms), 'arm')}, {len(data.runs)}{some} runs, seeds {seeds}",
        "",
        f"**Question.** {' '.join(data.question.split())}",
        "",
        f"**Command** (arms, factors, hypotheses: [the study](../../conf/study/{study.name}.yaml)):",
        "",
        "```bash",
        f"make study STUDY={study.name}{arguments}",
        "```",
        "",
        f"**Conditions.** Commit {', '.join(commits)}; torch {', '.join(torch)}; {machine()}. Last run ended on",
        f"{date_of(data)}; {cost}. Rows: {rows};",
        "with them beside its runs the study goes on where it is, with the code of that commit.",
        "",
    ]


def machine() -> str:
    """`2 cores of AMD EPYC 9554 64-Core Processor`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {named[0] if named else platform.processor() or platform.machine()}"


def main(arguments: Sequence[str]) -> int:
    try:
        if not 1 <= len(arguments) <= 2:
            raise ConfigError("usage: python -m symbiotic.studies.page runs/NAME [FOLDER]")
        runs, *folder = map(Path, arguments)
        print(write_page(read_study(runs.resolve().name), runs, *folder))
        return 0
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
