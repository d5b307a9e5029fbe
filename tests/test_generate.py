"""`src/generate.py`: images that say what they were made from, the same for the same request, resumed, one by one or by
file; and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inspected import run_folder
from symbiotic.evaluation.benchmark import measuring
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.images import image_facts, load_image
from symbiotic.models.unified import UnifiedModel
from symbiotic.runs import save_state, state_hash
from symbiotic.studies.generate import USAGE, Request, main
from symbiotic.trained import open_run

TORCHLESS = """
import runpy, sys
sys.argv = ["generate.py", *sys.argv[1:]]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print("exit", end.code, "torch" in sys.modules)
"""
PROMPT = "red 7 on gray bar left"


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generating") / "run"
    run_folder(shared_tmp, folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def index(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().split("\n")[:-1]]


def test_images_say_what_they_were_made_from(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert main([f"run={run}", f"prompt={PROMPT}", "n=3", "seed=5", "guidance=3", "steps=2", f"out={out}"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"3 images: {out}", f"grid  {out}/grid.png", f"index {out}/images.jsonl"]
    assert printed.err == ""
    assert sorted(tree(out)) == ["00000.png", "00001.png", "00002.png", "grid.png", "images.jsonl"]
    facts = image_facts(out / "00002.png")
    assert re.fullmatch("[0-9a-f]{12}", facts.pop("code"))
    assert facts == {
        "prompt": PROMPT,
        "seed": "5/2",
        "guidance": "3",
        "sampler": "euler, 2 steps, time shift 1",
        "size": "20x20",
        "run": "run",
        "weights": f"step=000020 {state_hash(open_run(run).model.state_dict())}",
    }
    assert [(row["file"], row["prompt"], row["seed"], row["number"]) for row in index(out)] == [
        (f"{i:05d}.png", PROMPT, 5, i) for i in range(3)
    ]
    with Image.open(out / "grid.png") as grid:
        assert grid.width == 3 * 240


def test_the_images_are_those_of_an_evaluation(run: Path, tmp_path: Path) -> None:
    captions = [PROMPT, "blue 1 on teal", PROMPT]
    (tmp_path / "p.txt").write_text(f"{captions[0]}\n\n {captions[1]} \n")
    assert main([f"run={run}", f"prompts={tmp_path / 'p.txt'}", "seed=3", "n=2", f"out={tmp_path / 'o'}"]) == 0
    trained = open_run(run)
    context = Context(trained.tokenizer, trained.config.objective, trained.size, seed=3)
    with measuring(trained.model) as model:
        gallery = context.gallery(model, "x", captions[:2], [1, 0])
    assert np.array_equal(load_image(tmp_path / "o" / "00001.png"), gallery[0])
    assert np.array_equal(load_image(tmp_path / "o" / "00002.png"), gallery[1])


def test_the_same_request_makes_the_same_bytes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = [f"run={run}", f"prompt={PROMPT}", "n=5", "batch_size=2"]
    a, b = tmp_path / "a", tmp_path / "b"
    assert [main([*request, f"out={out}"]) for out in (a, b)] == [0, 0]
    assert tree(a) == tree(b)
    assert len({content for name, content in tree(a).items() if name[0] == "0"}) == 5
    times = {path.name: path.stat().st_mtime_ns for path in a.glob("0*.png")}
    (a / "00003.png").unlink()
    (a / "00004.png").write_bytes((a / "00004.png").read_bytes()[:-60])
    capsys.readouterr()
    assert main([*request, f"out={a}"]) == 0
    assert tree(a) == tree(b)
    assert "5 images, 3 of them there before" in capsys.readouterr().out
    again = {path.name: path.stat().st_mtime_ns for path in a.glob("0*.png")}
    assert {name for name in times if times[name] == again[name]} == {"00000.png", "00001.png"}  # their whole batch
    assert main([*request[:-1], "batch_size=5", f"out={tmp_path / 'c'}"]) == 0
    for name, content in tree(tmp_path / "c").items():
        if name[0] == "0":  # another batch may round a pixel the other way
            one, other = (np.asarray(Image.open(BytesIO(data)), np.int16) for data in (content, tree(a)[name]))
            assert np.abs(one - other).max() <= 1
    (a / "mine.png").write_bytes(b"")
    assert main([f"run={run}", f"prompt={PROMPT}", "n=2", f"out={a}"]) == 0  # a smaller request for the same folder
    assert set(tree(a)) == {"00000.png", "00001.png", "grid.png", "images.jsonl", "mine.png"}


CHANGES = ("seed=1", "guidance=1", "steps=3", "time_shift=2", "size=24x16", "step=10", "prompt=blue 1 on teal bar top")


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_asked_for_changes_the_image_and_what_it_says(run: Path, tmp_path: Path, change: str) -> None:
    prompt = [] if change.startswith("prompt") else [f"prompt={PROMPT}"]
    out = tmp_path / "o"
    assert main([f"run={run}", f"prompt={PROMPT}", "n=1", f"out={out}"]) == 0
    before = image_facts(out / "00000.png"), load_image(out / "00000.png")
    assert main([f"run={run}", *prompt, "n=1", change, f"out={out}"]) == 0  # into the same folder: drawn again
    after = image_facts(out / "00000.png"), load_image(out / "00000.png")
    assert before[0] != after[0]
    assert not np.array_equal(before[1], after[1])
    if change.startswith("size"):
        assert after[1].shape == (24, 16, 3)


def test_images_go_to_the_run_folder_unless_told_otherwise(run: Path) -> None:
    for seed in (0, 1):
        assert main([f"run={run}", "prompt=Red 7, on gray!", "n=1", f"seed={seed}"]) == 0
    assert len(list((run / "generated").glob("red-7-on-gray-*/00000.png"))) == 2


def test_a_file_of_prompts_is_drawn_but_for_its_bad_lines(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        '{"prompt": "red 7"}',
        '{"prompt": "blue\u2028 1", "n": 1, "seed": 4}',
        "red 7",
        '{"promt": "red 7"}',
        '{"prompt": " "}',
        '{"prompt": "red", "n": 0}',
        '{"prompt": "red", "seed": "1"}',
        '{"prompt": "red \\ud800"}',
        "[1]",
        '{"prompt": "white 0 zebra"}',
    ]
    path, out = tmp_path / "p.jsonl", tmp_path / "o"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert main([f"run={run}", f"prompts={path}", "n=2", f"out={out}"]) == 1
    rows = index(out)
    assert [(row["prompt"], row["seed"], row["number"]) for row in rows] == [
        ("red 7", 0, 0),
        ("red 7", 0, 1),
        ("blue\u2028 1", 4, 0),
        ("white 0 zebra", 0, 0),
        ("white 0 zebra", 0, 1),
    ]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: words that the corpus does not have, all <unk> to the model: zebra"
    wrong = [
        "not JSON: ",
        "promt: no such key; did you mean 'prompt'?",
        "prompt=: must",
        "n=0: must be",
        "seed='1'",
        "not valid Unicode",
    ]
    for line, number, text in zip(said[1:8], range(3, 10), [*wrong, "must be a mapping"], strict=True):
        assert line.startswith(f"left out: {path}: line {number}: ")
        assert text in line
    assert said[8:] == [f"error: 7 lines were left out; the images of the others are in {out}"]


def test_files_without_a_usable_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, line in (
        (b"\n \n", "no line that can be used\n"),
        (b"\xff", "line 1: not UTF-8"),
        (b"{", "; .*: line 1"),
    ):
        path = tmp_path / "p.jsonl"
        path.write_bytes(content)
        assert main([f"run={run}", f"prompts={path}"]) == 1
        assert re.search(f"^error: {path}: .*{line}", capsys.readouterr().err)


def test_a_parent_that_only_understands_draws_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, path = open_run(run), tmp_path / "parent.safetensors"
    parent = UnifiedModel(trained.config.model, trained.config.system, latents=False).initialise(0)
    save_state(path, parent.state_dict())
    assert main([f"run={run}", "prompt=red", f"checkpoint={path}"]) == 2
    line = (
        f"error: run={run}: the weights in parent.safetensors are an understanding-only parent, which draws nothing\n"
    )
    assert capsys.readouterr().err == line


def without_torch(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = TORCHLESS.format(script=str(root / "src" / "generate.py"))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_help_and_mistakes_cost_no_torch(project_root: Path, tmp_path: Path, run: Path) -> None:
    assert without_torch(project_root, "--help").stdout == f"{USAGE}exit 0 False\n"
    for name in Request.__dataclass_fields__:
        assert f" {name}=" in USAGE
    (tmp_path / "p.jsonl").write_text("{")
    done = without_torch(project_root, f"run={run}", f"prompts={tmp_path / 'p.jsonl'}")
    assert done.stdout == "exit 1 False\n"


WRONG = {  # what is wrong -> exit status, and what the one line says
    "": (2, "prompt=WORDS draws one caption, prompts=FILE those of a file; give one of the two"),
    "prompt=red prompts=x.txt": (2, "give one of the two"),
    "prompt=": (2, "prompt=: must hold at least one word"),
    "promt=red": (2, r"promt=red: no such key; did you mean 'prompt'\?"),
    "prompt=red n=0": (2, "n=0: must be at least 1"),
    "prompt=red n=99999999999999999999": (2, "n=99999999999999999999: must be at most 100000"),
    "prompt=red n=two": (2, "n='two': must be int"),
    "prompt=red seed=-1": (2, "seed=-1: must be at least 0"),
    "prompt=red guidance=-1": (2, "guidance=-1: must be at least 0"),
    "prompt=red guidance=nan": (2, "guidance=nan: must be at least 0"),
    "prompt=red steps=0": (2, "steps=0: must be at least 1"),
    "prompt=red time_shift=0": (2, "time_shift=0: must be positive"),
    "prompt=red size=20": (2, "size=20: must be height and width in pixels, as in 20x20"),
    "prompt=red size=20x21": (2, r"size=20x21: sides must be multiples of 4 and at most \d+ pixels \(model.max_grid="),
    "prompt=red size=0x0": (2, "size=0x0: sides must be"),
    "prompt=red size=4000x4": (2, "size=4000x4: sides must be"),
    "prompt=red batch_size=0": (2, "batch_size=0: must be at least 1"),
    "prompt=red device=tpu": (2, "device=tpu: must be cpu, cuda"),
    "prompt=red ema=true step=10": (2, "ema=true: the weights are chosen already, by step=10"),
    "prompt=red ema=true": (1, "ema.safetensors: no such file; only a finished run"),
    "prompt=red step=11": (1, "no such checkpoint; steps that were kept: 10, and 0"),
    "prompts=nowhere.txt": (2, "prompts=nowhere.txt: no such file"),
    "prompts={run}/config.yaml": (2, r"config.yaml: must be a file .txt or .jsonl"),
    "prompt=red out={run}/config.yaml": (1, "cannot write images.*config.yaml"),
    "prompt=red data=nowhere": (1, r"nowhere/\w+/tokenizer\.json: no such file"),
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_one_line(arguments: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = WRONG[arguments]
    assert main([f"run={run}", *arguments.format(run=run).split()]) == status
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert re.search(line, printed)
