"""Every benchmark runs to its tables at sizes of nothing; what it measures is looked at where it is run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other as they stand side by side; their names are free again afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


def run(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    importlib.import_module(name).main([*arguments, "--rounds", "2", "--out", str(out)])
    found = json.loads((out / f"{name}.json").read_text())
    assert {"machine", "date", "commit", "torch"} <= set(found)
    assert (out / f"{name}.md").read_text().startswith(f"# {name}: ")
    return found


@pytest.mark.parametrize("name", ["moe_layer", "attention", "training_step", "scaling", "sampling"])
@pytest.mark.usefixtures("benchmarks")
def test_it_compares_its_contenders(name: str, tmp_path: Path) -> None:
    found = run(name, tmp_path, "--sizes", "micro", "--quick")
    assert all(len(rows) >= 1 for rows in found["tables"].values())
    seconds = [each for group in found["seconds"].values() for each in group.values() if each]
    assert len(seconds) >= 2
    assert all(len(each) == 2 for each in seconds)


@pytest.mark.usefixtures("benchmarks")
def test_a_peer_that_is_not_installed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "installed", lambda package: False)
    (rows,) = run("moe_layer", tmp_path, "--sizes", "micro")["tables"].values()
    row = next(row for row in rows if row["contender"] == "transformers eager")
    assert "not installed: pip install" in row["time / dense FFN"]


@pytest.mark.usefixtures("benchmarks")
def test_starts_are_told_with_what_they_import(tmp_path: Path) -> None:
    (rows,) = run("startup", tmp_path, "--commands", "unknown key")["tables"].values()
    assert rows[0]["imports"] == "hydra; exit 2"


@pytest.mark.usefixtures("benchmarks")
def test_ratios_are_taken_round_by_round() -> None:
    harness = importlib.import_module("harness")
    slow, fast = (
        harness.Contender(name, None, seconds=s) for name, s in (("a", [4.0, 9.0, 2.0]), ("b", [2.0, 3.0, 2.0]))
    )
    assert harness.ratio(slow, fast) == (2.0, 1.0, 3.0)
    assert harness.ratio(slow, harness.Contender("c", None)) is None
