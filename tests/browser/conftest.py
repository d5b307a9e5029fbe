"""The browser, and where the screenshots go."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The headless Chromium at CHROMIUM or on PATH; it can look up no host."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.fail("no chromium: `make test-browser` installs one, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--host-resolver-rules=MAP * ~NOTFOUND"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def all_shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = os.environ.get("BROWSER_SHOTS")
    return Path(base).resolve() if base else tmp_path_factory.mktemp("shots")


@pytest.fixture
def shots(all_shots: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder for this test's screenshots, which is printed: below BROWSER_SHOTS, or a temporary one."""
    folder = all_shots / re.sub(r"\W+", "-", request.node.name).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    with capsys.disabled():
        print(f"\nscreenshots: {folder}")
    return folder
