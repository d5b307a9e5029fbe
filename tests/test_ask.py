"""`src/ask.py`: the answers are those of an evaluation, one by one or by file; and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inspected import run_folder
from symbiotic.evaluation.benchmark import measuring
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.embedded_understanding import Knowledge, Reading
from symbiotic.studies.ask import USAGE, Request, main
from symbiotic.trained import Trained, open_run

TORCHLESS = """
import runpy, sys
sys.argv = ["ask.py", *sys.argv[1:]]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print("exit", end.code, "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asking") / "run"
    run_folder(shared_tmp, folder)
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return open_run(run)


def evaluated(trained: Trained, benchmark: Any) -> list[dict[str, Any]]:
    context = Context(trained.tokenizer, trained.config.objective)
    with measuring(trained.model) as model:
        list(benchmark.run(model, context))
    return context.records


def answers_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n")[:-1]]


def test_a_question_about_an_image_is_answered_as_in_an_evaluation(
    run: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = trained.corpus / "benchmarks" / "reading"
    records = evaluated(trained, Reading(reading, 4))
    assert len({record["prediction"] for record in records}) > 1
    for record in records:
        image = f"image={reading}/images/{int(record['id']):05d}.png"
        assert main([f"run={run}", f"question={record['question']}", image, "max_new_tokens=4"]) == 0
        assert capsys.readouterr().out == record["prediction"] + "\n"


def test_choices_get_the_letter_and_probabilities_of_an_evaluation(
    run: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    records = evaluated(trained, Knowledge(trained.corpus / "benchmarks" / "knowledge", 4))
    for record in records:
        choices = "|".join(record["choices"])
        assert main([f"run={run}", f"question={record['question']}", f"choices={choices}"]) == 0
        letter, *rows = capsys.readouterr().out.splitlines()
        assert letter == record["prediction"]
        shares = [f"{np.exp(score):.3f}" for score in record["log_probs"]]
        expected = zip("ABCD", shares, record["choices"], strict=True)
        assert [row.split(maxsplit=2) for row in rows] == [list(row) for row in expected]


def test_a_file_of_questions_is_answered_but_for_its_bad_lines(
    run: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = evaluated(trained, Reading(trained.corpus / "benchmarks" / "reading", 3))
    knowledge = evaluated(trained, Knowledge(trained.corpus / "benchmarks" / "knowledge", 2))
    (tmp_path / "images").mkdir()
    for record in reading:
        source = trained.corpus / "benchmarks" / "reading" / "images" / f"{int(record['id']):05d}.png"
        (tmp_path / "images" / f"{record['id']}.png").write_bytes(source.read_bytes())
    Image.new("RGB", (21, 20)).save(tmp_path / "images" / "odd.png")
    (tmp_path / "images" / "text.png").write_text("no image")
    rows: list[Any] = [{"question": r["question"], "image": f"images/{r['id']}.png"} for r in reading]
    rows += [{"question": r["question"], "choices": r["choices"]} for r in knowledge]
    rows += [{"question": "x", "image": f"images/{name}.png"} for name in ("odd", "text", "none")]
    rows += [{"question": "x", "choices": ["red", "blue"]}, {"image": "images/0.png"}, 3]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "o"
    command = [f"run={run}", f"questions={path}", "max_new_tokens=4", f"out={out}", "batch_size=2"]
    assert main(command) == 1
    found = answers_in(out)
    assert [row["answer"] for row in found] == [record["prediction"] for record in [*reading, *knowledge]]
    assert [row.get("image") for row in found[2:4]] == [str(tmp_path / "images" / "2.png"), None]
    assert found[-1]["choices"] == knowledge[-1]["choices"]
    assert sum(found[-1]["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert "probabilities" not in found[0]
    printed = capsys.readouterr()
    assert printed.out == f"{len(found)} answers: {out}/answers.jsonl\n"
    said = printed.err.splitlines()
    wrong = ["none.png: no such file", "choices=red|blue: must be four texts", "question: missing", "must be a mapping"]
    wrong += ["odd.png: 20 x 21 pixels; sides must be multiples of 4", "text.png: not a readable image"]
    assert len(said) == len(wrong) + 1
    for line, text in zip(said, wrong, strict=False):
        assert line.startswith(f"left out: {tmp_path}")
        assert text in line
    assert said[-1] == f"error: 6 lines were left out; the answers to the others are in {out}/answers.jsonl"
    before = (out / "answers.jsonl").read_bytes()
    assert main([*command, "step=10"]) == 1
    assert (out / "answers.jsonl").read_bytes() != before
    assert main(command) == 1
    assert (out / "answers.jsonl").read_bytes() == before


def test_a_file_of_lines_goes_to_the_run_folder(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "my questions.txt"
    path.write_text("what number is it ?\n\nwhat color is it ?\n")
    assert main([f"run={run}", f"questions={path}"]) == 0
    (folder,) = (run / "answers").glob("my-questions-*")
    assert [row["question"] for row in answers_in(folder)] == ["what number is it ?", "what color is it ?"]


def test_unknown_words_are_warned_about(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = "choices=zebra|red|blue|zebra"
    assert main([f"run={run}", "question=what gnu is it ?", choices]) == 0
    assert (
        capsys.readouterr().err == "warning: words that the corpus does not have, all <unk> to the model: gnu zebra\n"
    )


def test_no_image_of_a_file_can_be_used(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "q.jsonl").write_text('{"question": "x", "image": "a.png"}\n' * 2)
    assert main([f"run={run}", f"questions={tmp_path / 'q.jsonl'}"]) == 1
    assert re.fullmatch(r"error: .*a.png: not a readable image .* \(and 1 more\)\n", capsys.readouterr().err)


def without_torch(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = TORCHLESS.format(script=str(root / "src" / "ask.py"))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_help_and_mistakes_cost_no_torch(project_root: Path) -> None:
    assert without_torch(project_root, "--help").stdout == f"{USAGE}exit 0 False\n"
    for name in Request.__dataclass_fields__:
        assert f"\n  {name}=" in USAGE
    done = without_torch(project_root, "run=nowhere", "qestion=x")
    assert done.stdout == "exit 2 False\n"
    assert done.stderr == "error: qestion=x: no such key; did you mean 'question'?\n"


WRONG = {  # what is wrong -> exit status, and what the one line says
    "": (2, "question=WORDS asks one question, questions=FILE those of a file; give one of the two"),
    "question=x questions=q.txt": (2, "give one of the two"),
    "question=": (2, "question=: must hold at least one word"),
    "question=x choices=a|b": (2, r"choices=a\|b: must be four texts, A\|B\|C\|D"),
    "question=x choices=a||b|c": (2, "choices=: must hold at least one word"),
    "question=x\udcff": (2, r"question='x\\udcff': not valid Unicode"),
    "question=x image=nowhere.png": (2, r"image=nowhere\.png: no such file"),
    "question=x image={run}/config.yaml": (1, r"config\.yaml: not a readable image"),
    "question=x max_new_tokens=0": (2, "max_new_tokens=0: must be at least 1"),
    "question=x batch_size=0": (2, "batch_size=0: must be at least 1"),
    "question=x out=o": (2, "out=o: has no effect here"),
    "questions=nowhere.txt": (2, r"questions=nowhere\.txt: no such file"),
    "questions={run}/config.yaml": (2, r"must be a file \.txt or \.jsonl"),
    "questions={run}/config.yaml image=x.png": (2, "image: has no effect here: each line"),
    "question=x device=tpu": (2, "device=tpu: must be cpu"),
    "question=x step=11": (1, "no such checkpoint; steps that were kept: 10, and 0"),
    "question=x ema=true checkpoint=x": (2, "ema=true: the weights are chosen already, by checkpoint=x"),
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_one_line(arguments: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = WRONG[arguments]
    assert main([f"run={run}", *arguments.format(run=run).split()]) == status
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert re.search(line, printed)
