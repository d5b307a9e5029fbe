"""The notebooks run from top to bottom, in their quick mode; each says what it asks and costs, and holds no output."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]

ours = pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    """As a text, or as a list of lines: the format allows both."""
    return "".join(cell["source"])


def run_cell(text: str, name: str, namespace: dict[str, Any]) -> None:
    """As a kernel does: run it, show what its last line is worth, and draw its figures."""
    import matplotlib.pyplot as plt

    body = ast.parse(text, name).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        getattr(value, "_repr_html_", value.__repr__)()
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


@ours
def test_it_runs_and_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import matplotlib as mpl

    monkeypatch.setenv("SYMBIOTIC_QUICK", "1")
    monkeypatch.chdir(tmp_path)
    notebook = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)  # where classes of its cells look for their module
    with mpl.rc_context():
        for number, cell in enumerate(cells(path, "code")):
            run_cell(source(cell), f"{path.name}, code cell {number}", vars(notebook))
    assert list(tmp_path.iterdir()) == []


def test_there_are_some() -> None:
    assert NOTEBOOKS


@ours
def test_the_first_cell_names_one_question_and_the_cost(path: Path) -> None:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert len(re.findall(r"\*\*Question\.\*\* [^?]+\?", source(first))) == 1
    seconds = re.search(r"\*\*Cost\.\*\* About (\d+) s on one CPU core", source(first))
    assert seconds
    assert int(seconds[1]) < 60


@ours
def test_outputs_are_stripped(path: Path) -> None:
    assert [cell for cell in cells(path, "code") if cell["outputs"] or cell["execution_count"] is not None] == []


@ours
def test_its_readers_need_no_other_tool(path: Path) -> None:
    """Nothing but Python: no magic, no shell, nothing that installs or downloads."""
    for cell in cells(path, "code"):
        assert not re.search(r"^\s*[%!]", source(cell), re.MULTILINE)
        ast.parse(source(cell))


def test_the_readme_names_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"(notebooks/{path.name})" not in readme] == []
