"""The index of the experiments is that of their pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from symbiotic.schema import RunError
from symbiotic.studies.experiments import FOLDER, index


def test_the_committed_index_is_the_generated_one() -> None:
    """`python -m symbiotic.studies.experiments` writes it anew."""
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == index()


def test_every_folder_has_its_page_and_its_results() -> None:
    folders = [path for path in FOLDER.iterdir() if path.is_dir()]
    assert len(folders) >= 3
    assert [path.name for path in folders if not {"README.md", "results.csv"} <= {f.name for f in path.iterdir()}] == []


def test_the_newest_stands_first_and_a_page_without_question_is_named(tmp_path: Path) -> None:
    for day in ("2026-01-02", "2026-11-01"):
        (tmp_path / f"{day}-x").mkdir()
        (tmp_path / f"{day}-x" / "README.md").write_text(f"# Of {day}\n\n**Question.** What\nthen?\n\nText.\n")
    rows = index(tmp_path).splitlines()[-2:]
    assert rows[0] == "| 2026-11-01 | [Of 2026-11-01](2026-11-01-x/README.md) | What then? |"
    (tmp_path / "2026-01-02-x" / "README.md").write_text("# No question\n")
    with pytest.raises(RunError, match=r"2026-01-02-x/README\.md: a folder begins with its date"):
        index(tmp_path)
