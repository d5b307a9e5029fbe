"""The index of `experiments/`, made from the experiments' own pages: `python -m symbiotic.studies.experiments`."""

from __future__ import annotations

import re
from pathlib import Path

from symbiotic.config import ROOT
from symbiotic.schema import RunError

FOLDER = ROOT / "experiments"
HEAD = """\
# Experiments

Dated, with their commands, machines, numbers and verdicts; what was not found stands as plainly as what was. Made by
`python -m symbiotic.studies.experiments` from the pages below; those of studies are begun by
`python -m symbiotic.studies.page runs/NAME`, and people write what they say.

| date | experiment | question |
|---|---|---|
"""


def index(folder: Path = FOLDER) -> str:
    """Newest first.

    Raises:
        RunError: a page without a title or a question.
    """
    pages = sorted(folder.glob("*/README.md"), key=lambda page: page.parent.name, reverse=True)
    return HEAD + "".join(row(page) for page in pages)


def row(page: Path) -> str:
    text, name = page.read_text(encoding="utf-8"), page.parent.name
    title = re.match(r"# (.+)\n", text)
    question = re.search(r"^\*\*Question\.\*\* (.+?)\n\n", text, re.MULTILINE | re.DOTALL)
    dated = re.match(r"\d{4}-\d\d-\d\d", name)
    if not (title and question and dated):
        right = "a folder begins with its date, its page with '# title' and '**Question.** …'"
        raise RunError(f"{page}: {right}")
    return f"| {dated[0]} | [{title[1]}]({name}/README.md) | {' '.join(question[1].split())} |\n"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(index(), encoding="utf-8")
