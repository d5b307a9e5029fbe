"""OCRBench v2: predictions as its official scripts read them, and what they wrote read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from factory import build
from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.context import Context, whole_lines
from symbiotic.evaluation.ocrbench_v2 import GROUPS, OCRBenchV2
from symbiotic.schema import ConfigError, Objective

TOKENIZER = Tokenizer.build(["what", "is", "written", *(f"w{chr(97 + i)}" for i in range(20))])
TYPES = ["text recognition en", "full-page OCR en", "text grounding en", "full-page OCR cn", "text translation cn"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("symbiotic", seed=2, vocab_size=TOKENIZER.vocab_size, init_std=0.5, max_grid=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """OCRBench_v2.json with answers of every kind that the official file has."""
    answers = [["a"], ["b"], [1, 2, 3, 4], [{"key": ["value"]}], "text"]
    (tmp_path / "v2" / "EN_part").mkdir(parents=True)
    rows = []
    for number, (kind, answer) in enumerate(zip(TYPES, answers, strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "v2" / "EN_part" / f"{number}.png")
        more = {"eval": "case sensitive"} if number == 0 else {}
        question = {"question": "what is written 数", "answers": answer}
        rows.append(
            {"dataset_name": "d", "type": kind, "id": number, "image_path": f"EN_part/{number}.png", **question, **more}
        )
    (tmp_path / "v2" / "OCRBench_v2.json").write_text(json.dumps(rows))
    return tmp_path / "v2"


def run(folder: Path, model: torch.nn.Module, out: Path | None) -> tuple[dict[str, Value], Context]:
    here = Context(TOKENIZER, Objective(), folder=out, batch_size=2)
    with measuring(model):
        return dict(OCRBenchV2(str(folder), max_new_tokens=6).run(model, here)), here


def scored(out: Path, model: torch.nn.Module, folder: Path, values: list[Any]) -> Path:
    """What eval.py leaves: the predictions, with a score each."""
    with pytest.raises(MissingAsset, match=r"results\.json: no such file; .*eval\.py --input_path"):
        run(folder, model, out)
    rows = json.loads((out / "exports" / "ocrbench_v2" / "predictions.json").read_text())
    path = out / "exports" / "ocrbench_v2" / "results.json"
    path.write_text(json.dumps([row | {"score": value} for row, value in zip(rows, values, strict=True)]))
    return path


def test_predictions_are_the_entries_with_a_text_each(tmp_path: Path, folder: Path, model: torch.nn.Module) -> None:
    scored(tmp_path / "out", model, folder, [0] * 5)
    exported = json.loads((tmp_path / "out" / "exports" / "ocrbench_v2" / "predictions.json").read_text())
    predictions = [row.pop("predict") for row in exported]
    assert exported == json.loads((folder / "OCRBench_v2.json").read_text())
    assert predictions == [r["prediction"] for r in whole_lines(tmp_path / "out" / "ocrbench_v2.jsonl")]
    assert any(predictions)
    assert "数" in (tmp_path / "out" / "exports" / "ocrbench_v2" / "predictions.json").read_text()


def test_results_are_averaged_as_the_official_script_does(tmp_path: Path, folder: Path, model: torch.nn.Module) -> None:
    path = scored(tmp_path / "out", model, folder, [1, 0.5, 0.25, 1, 0.5])
    rows = json.loads(path.read_text())
    rows[4]["ignore"] = "True"
    path.write_text(json.dumps(rows))
    broken = build("symbiotic", vocab_size=TOKENIZER.vocab_size)  # other weights: nothing is decoded again
    found, _ = run(folder, broken, tmp_path / "out")
    assert found == {
        "ocrbench_v2/en": Value((0.75 + 0.25) / 2, 3),
        "ocrbench_v2/cn": Value(1, 1),
        "ocrbench_v2/en_text_recognition": Value(0.75, 2),
        "ocrbench_v2/en_text_detection": Value(0.25, 1),
        "ocrbench_v2/cn_text_recognition": Value(1, 1),
    }


def test_an_empty_prediction_that_the_official_script_forgets_is_named(
    tmp_path: Path, folder: Path, model: torch.nn.Module
) -> None:
    path = scored(tmp_path / "out", model, folder, [1, 0.5, 0.25, 1, 0.5])
    ledger, exported = tmp_path / "out" / "ocrbench_v2.jsonl", json.loads(path.read_text())
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    for rows, key in ((records, "prediction"), (exported, "predict")):
        rows[1][key] = " "
    del exported[1]["score"]
    ledger.write_text("".join(json.dumps(record) + "\n" for record in records))
    path.write_text(json.dumps(exported))
    found, here = run(folder, model, tmp_path / "out")
    assert found["ocrbench_v2/en_text_recognition"] == Value(1, 1)
    assert here.problems == ["results.json: entry 1: an empty prediction, which eval.py gave no score"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "4 entries; predictions.json beside it has 5"),
        (lambda rows: [*rows[:-1], {**rows[-1], "predict": "another"}], "entry 4: not the result of the prediction"),
        (lambda rows: [*rows[:-1], {**rows[-1], "score": None}], "entry 4: score None; must be a number"),
        (lambda rows: [{k: v for k, v in row.items() if k != "score"} for row in rows], "score None; must be a number"),
        (lambda rows: [*rows[:-1], "row"], "entry 4: not the result"),
        (lambda rows: {"rows": rows}, "must be a JSON list"),
    ],
)
def test_results_of_something_else_are_refused(
    tmp_path: Path, folder: Path, model: torch.nn.Module, change: Any, message: str
) -> None:
    path = scored(tmp_path / "out", model, folder, [0] * 5)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        run(folder, model, tmp_path / "out")


def test_entries_that_cannot_be_used_are_named_and_left_out(
    tmp_path: Path, folder: Path, model: torch.nn.Module
) -> None:
    rows = json.loads((folder / "OCRBench_v2.json").read_text())
    bad = [
        {**rows[0], "type": "unknown"},
        {**rows[0], "image_path": "9.png"},
        {**rows[0], "type": ["x"]},
        {**rows[0], "question": 5},
        {"id": 1},
        "x",
    ]
    (folder / "OCRBench_v2.json").write_text(json.dumps([*bad, *rows]))
    (folder / "EN_part" / "4.png").write_bytes(b"broken")
    here = Context(TOKENIZER, Objective(), folder=tmp_path / "out", batch_size=2)
    with measuring(model), pytest.raises(MissingAsset):
        list(OCRBenchV2(str(folder), max_new_tokens=2).run(model, here))
    assert len(json.loads((tmp_path / "out" / "exports" / "ocrbench_v2" / "predictions.json").read_text())) == 4
    assert [line.split(": ", 1)[1] for line in here.problems[:6]] == [
        "entry 0: type 'unknown' is none of OCRBench v2",
        "entry 1: no image 9.png",
        "entry 2: type ['x'] is none of OCRBench v2",
        "entry 3: question and image_path must be texts",
        "entry 4: no type, image_path, question, answers",
        "entry 5: must be a mapping, not str",
    ]
    assert "4.png: not a readable image" in here.problems[6]


def test_settings(folder: Path, model: torch.nn.Module) -> None:
    whole = OCRBenchV2(str(folder)).protocol()
    json.dumps(whole)
    assert whole == OCRBenchV2(str(folder / "OCRBench_v2.json")).protocol()
    assert OCRBenchV2(str(folder), max_new_tokens=9).protocol() != whole
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        OCRBenchV2(max_new_tokens=0)
    with pytest.raises(MissingAsset, match="no folder for its predictions"):
        run(folder, model, None)
    assert len({kind for kinds in GROUPS.values() for kind in kinds}) == 30
