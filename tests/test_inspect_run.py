"""The command line of the router inspector: quick help, one line for every mistake, and where the files are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inspected import run_folder
from symbiotic.studies.inspection import USAGE, Request, main

TORCHLESS = """
import runpy, sys
sys.argv = ["inspect_run.py", *sys.argv[1:]]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print("exit", end.code, "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commanded") / "run"
    run_folder(shared_tmp, folder)
    return folder


def without_torch(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = TORCHLESS.format(script=str(root / "src" / "inspect_run.py"))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_help_names_every_key_without_torch(project_root: Path) -> None:
    done = without_torch(project_root, "--help")
    assert done.stdout == f"{USAGE}exit 0 False\n"
    for name in Request.__dataclass_fields__:
        assert f"\n  {name}=" in USAGE


def test_a_mistake_costs_no_torch(project_root: Path) -> None:
    done = without_torch(project_root, "run=nowhere", "promt=red")
    assert done.stdout == "exit 2 False\n"
    assert done.stderr == "error: promt=red: no such key; did you mean 'prompt'?\n"


def test_the_script_prints_and_writes(run: Path, project_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(project_root / "src" / "inspect_run.py"), f"run={run}", f"out={tmp_path / 'o'}"]
    done = subprocess.run([*command, "prompt=what number is it ?"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert (tmp_path / "o" / "inspection.txt").read_text().splitlines()[0] == done.stdout.splitlines()[0].rstrip()
    assert [line.split() for line in done.stdout.splitlines()[-3:]] == [
        [kind, str(tmp_path / "o" / f"inspection.{kind}")] for kind in ("txt", "html", "json")
    ]
    assert json.loads((tmp_path / "o" / "inspection.json").read_text())["prompt"] == "what number is it ?"


def test_files_go_to_the_run_folder_unless_told_otherwise(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run={run}", "prompt=red 7", "task=generation", "against=init"]) == 0
    folder = next((run / "inspection").iterdir())
    assert folder.name.startswith("generation-red-7-")
    assert sorted(path.name for path in folder.iterdir()) == [f"inspection.{s}" for s in ("html", "json", "txt")]
    assert str(folder / "inspection.html") in capsys.readouterr().out


WRONG = {  # what is wrong -> exit status, and what the one line says
    "promt=red": (2, r"promt=red: no such key; did you mean 'prompt'\?"),
    "--verbose": (2, r"--verbose: cannot be read as key=value; see --help"),
    "prompt=red prompt=blue": (2, "prompt=blue: prompt is given twice"),
    "": (2, "prompt: missing; it has no default"),
    "prompt=": (2, "prompt=: must hold at least one word"),
    "prompt=red task=draw": (2, "task='draw': must be one of understanding, generation"),
    "prompt=red time=2": (2, r"time=2: must lie in \[0, 1\]"),
    "prompt=red time=nan": (2, r"time=nan: must lie in \[0, 1\]"),
    "prompt=red time=soon": (2, "time='soon': must be float"),
    "prompt=red seed=-1": (2, "seed=-1: must be at least 0"),
    "prompt=red rows=0": (2, "rows=0: must be at least 1"),
    "prompt=red rows=all": (2, "rows='all': must be int"),
    "prompt=red all=yes": (2, "all='yes': must be bool"),
    "prompt=red step=10 checkpoint=x.ckpt": (2, r"step=10: the weights are chosen already, by checkpoint=x\.ckpt"),
    "prompt=red image=nowhere.png": (2, r"image=nowhere\.png: no such file"),
    "prompt=red device=meta": (2, "device=meta: must be cpu, cuda, "),
    "prompt=red device=xpu:99": (2, "device=xpu:99: "),
    "prompt=red step=11": (1, r"step=000011\.ckpt: no such checkpoint; steps that were kept: 10, and 0"),
    "prompt=red checkpoint=nowhere.ckpt": (1, r"nowhere\.ckpt: no such checkpoint"),
    "prompt=red against=nowhere.ckpt": (1, r"nowhere\.ckpt: no such checkpoint"),
    "prompt=red data=nowhere": (1, r"nowhere/\w+/tokenizer\.json: no such file"),
    "prompt=red task=generation image={run}/config.yaml": (1, r"config\.yaml: not a readable image"),
    "prompt=red checkpoint={run}/config.yaml": (1, r"config\.yaml: not a readable checkpoint"),
    "prompt=red out={run}/config.yaml": (1, r"config\.yaml: cannot be written: File exists; out=FOLDER"),
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_one_line(arguments: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = WRONG[arguments]
    pieces = arguments.format(run=run).replace(" ", "\n").splitlines()
    assert main([f"run={run}", *pieces]) == status
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert re.search(line, printed)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, line in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no config.yaml in it")):
        assert main([f"run={folder}", "prompt=red"]) == 2
        assert f"error: run={folder}: {line}" in capsys.readouterr().err
