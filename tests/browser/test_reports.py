"""What the project writes as HTML, in a Chromium: whole and readable, on a desktop and a phone, light and dark.

`make test-browser`; `make test-browser REPORT=FOLDER/report.html` opens that report too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from browser.opened import opened
from inspected import run_folder
from studies.studied import write_study
from symbiotic.studies.inspection import Request, inspect
from symbiotic.studies.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

SECTIONS = (
    "summary", "verdicts", "results", "forgetting", "curves", "routing", "samples", "audit", "provenance",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected") / "run"
    run_folder(shared_tmp, folder)
    return folder


@pytest.mark.parametrize("task", ["reading", "generation"])
def test_an_inspection(task: str, run: Path, browser: Browser, shots: Path) -> None:
    picture = run / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(picture)
    more = {"image": str(picture)} if task == "reading" else {"task": task, "against": "init"}
    prompt = "what number is it ?" if task == "reading" else "red 7 on gray bar left"
    paths = inspect(Request(run=str(run), prompt=prompt, **more))
    found = opened(browser, next(path for path in paths if path.suffix == ".html"), shots)
    assert found.faults == []
    assert found.tables == 2
    assert found.figures >= 1


def test_a_report(tmp_path: Path, browser: Browser, shots: Path) -> None:
    runs = write_study(tmp_path / "runs")
    paths = write_report(runs, "none", ["system", "mix", "phases"], tmp_path / "report", None)
    found = opened(browser, next(path for path in paths if path.suffix == ".html"), shots, SECTIONS)
    assert found.faults == []
    assert found.tables >= 5
    assert found.figures >= 4


@pytest.mark.skipif(not os.environ.get("REPORT"), reason="`make test-browser REPORT=FILE` opens that report too")
def test_a_given_report(browser: Browser, shots: Path) -> None:
    path = Path(os.environ["REPORT"])
    assert path.is_file(), f"REPORT={path}: no such file"
    found = opened(browser, path, shots, SECTIONS)
    assert found.faults == []
    assert found.tables > 0
    assert found.figures > 0
