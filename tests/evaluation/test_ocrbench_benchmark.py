"""OCRBench by lm-eval with a real small model: all layouts, evaluations that go on, and images that do not fit."""

from __future__ import annotations

import base64
import csv
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from factory import build
from symbiotic.data.formats import reading_parts
from symbiotic.data.packing import build_sample
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation import images
from symbiotic.evaluation.assets import ASSETS
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.context import Context, whole_lines
from symbiotic.evaluation.lm_eval_adapter import Answering, run_task
from symbiotic.evaluation.ocrbench import FORMULA_TYPE, GROUPS, OFFICIAL_COUNTS, correct, read_ocrbench
from symbiotic.evaluation.ocrbench_benchmark import OCRBench, described, document, fitted_size, readable, scores
from symbiotic.evaluation.prompts import answers
from symbiotic.schema import Objective

TOKENIZER = Tokenizer.build(["what", "is", "written", *(f"w{chr(97 + i)}" for i in range(20))])
KINDS = [kind for kinds in GROUPS.values() for kind in kinds]


class Watched(torch.nn.Module):
    """A model that counts its forwards, and breaks after so many."""

    def __init__(self, inner: torch.nn.Module, breaks_after: int = 10**9) -> None:
        super().__init__()
        self.inner, self.cfg, self.calls, self.breaks_after = inner, inner.cfg, 0, breaks_after

    def forward(self, *args: Any, **more: Any) -> Any:
        if self.calls == self.breaks_after:
            raise KeyboardInterrupt
        self.calls += 1
        return self.inner(*args, **more)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("symbiotic", seed=2, vocab_size=TOKENIZER.vocab_size, init_std=0.5, max_grid=5)


@pytest.fixture(scope="module")
def rows(model: torch.nn.Module) -> list[dict[str, Any]]:
    """An entry of every type; the model answers those of the first half, and the formula with its spaces lost."""
    drawn = np.random.default_rng(0).integers(0, 256, (len(KINDS), 20, 16, 3), dtype=np.uint8)
    found = []
    for number, (kind, pixels) in enumerate(zip(KINDS, drawn, strict=True)):
        text = decoded(model, [pixels])[0]
        right = number < 5 or kind == FORMULA_TYPE
        answer = text.upper().replace("W", "w") if kind == FORMULA_TYPE else text.upper()
        given = [
            "not this",
            answer if right and kind != FORMULA_TYPE else text.replace(" ", "") if right else "not that",
        ]
        name = "HME100k" if kind == FORMULA_TYPE else "some"
        found.append({"dataset": name, "kind": kind, "pixels": pixels, "answers": given, "text": text})
    return found


def decoded(model: torch.nn.Module, pixels: Sequence[np.ndarray]) -> list[str]:
    with torch.no_grad():
        parts = [reading_parts(one, "what is written", TOKENIZER) for one in pixels]
        return answers(model.eval(), [build_sample("", "mmu", part) for part in parts], TOKENIZER, 100, 4)


def png(folder: Path, number: int, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder / f"{number}.png"


def write_json(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    entries = []
    for number, row in enumerate(rows):
        path = png(folder / "OCRBench_Images", number, row["pixels"])
        facts = {"dataset_name": row["dataset"], "type": row["kind"], "answers": row["answers"], "id": number}
        entries.append({**facts, "image_path": path.name, "question": "what is written"})
    (folder / "OCRBench.json").write_text(json.dumps(entries))
    return folder


def write_parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    entries = []
    for number, row in enumerate(rows):
        path = png(folder / "drawn", number, row["pixels"])
        facts = {"dataset": row["dataset"], "question_type": row["kind"], "answer": row["answers"]}
        image = {"bytes": path.read_bytes(), "path": path.name}
        entries.append({**facts, "image": image, "question": "what is written"})
    parquet.write_table(pyarrow.Table.from_pylist(entries), folder / "test-00000-of-00001.parquet")
    return folder


def write_tsv(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    lines = [["index", "image", "question", "answer", "category"]]
    for number, row in enumerate(rows):
        image = base64.b64encode(png(folder / "drawn", number, row["pixels"]).read_bytes()).decode()
        lines.append([str(number), image, "what is written", repr(row["answers"]), row["kind"]])
    with (folder / "OCRBench.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(lines)
    return folder


def context(folder: Path | None = None, **more: Any) -> Context:
    return Context(TOKENIZER, Objective(), folder=folder, **({"batch_size": 4} | more))


def run(benchmark: OCRBench, model: torch.nn.Module, here: Context) -> dict[str, Value]:
    with measuring(model):
        return dict(benchmark.run(model, here))


@pytest.mark.parametrize("write", [write_json, write_parquet, write_tsv])
def test_every_layout_gives_the_scores_worked_out_by_hand(
    tmp_path: Path, model: torch.nn.Module, rows: list[dict[str, Any]], write: Any
) -> None:
    here = context(tmp_path / "out")
    found = run(OCRBench(str(write(tmp_path, rows))), model, here)
    assert {name: tuple(value)[:2] for name, value in found.items()} == {
        "ocrbench_share": (0.6, 10),
        "ocrbench_share/text_recognition": (5 / 6, 6),
        "ocrbench_share/scene_vqa": (0, 1),
        "ocrbench_share/document_vqa": (0, 1),
        "ocrbench_share/key_information": (0, 1),
        "ocrbench_share/handwritten_math": (1, 1),
    }
    assert here.problems == []
    records = list(whole_lines(tmp_path / "out" / "ocrbench.jsonl"))
    assert [record["prediction"] for record in records] == [row["text"] for row in rows]
    assert [record["id"] for record in records] == [str(i) for i in range(10)]
    assert all(r["correct"] == correct(r["prediction"], r["answers"], r["dataset_name"]) for r in records)
    assert len({record["prediction"] for record in records}) > 5


def test_scores_from_records_are_lm_evals_own(
    tmp_path: Path, model: torch.nn.Module, rows: list[dict[str, Any]]
) -> None:
    entries, _ = read_ocrbench(write_json(tmp_path, rows))
    read = functools.partial(readable, largest=20, resize=True)
    answering = Answering(model.eval(), TOKENIZER, functools.partial(context().measured, "x"), described, pixels=read)
    with torch.no_grad():
        theirs = run_task("ocrbench", [document(entry) for entry in entries], answering)
    assert theirs["correct,none"] == dict(scores(answering.records))["ocrbench_share"].value == 0.6


def test_an_evaluation_that_was_killed_goes_on(
    tmp_path: Path, model: torch.nn.Module, rows: list[dict[str, Any]]
) -> None:
    benchmark = OCRBench(str(write_json(tmp_path / "ocrbench", rows)))
    counted = Watched(model)
    whole = run(benchmark, counted, context(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, Watched(model, counted.calls - 1), context(tmp_path / "cut"))
    kept = len(list(whole_lines(tmp_path / "cut" / "ocrbench.jsonl")))
    assert 0 < kept < 10
    rest = Watched(model)
    assert run(benchmark, rest, context(tmp_path / "cut")) == whole
    assert rest.calls < counted.calls
    assert (tmp_path / "cut" / "ocrbench.jsonl").read_bytes() == (tmp_path / "whole" / "ocrbench.jsonl").read_bytes()
    assert run(benchmark, Watched(model, 0), context(tmp_path / "cut")) == whole


def test_images_of_any_mode_and_size_are_read(
    tmp_path: Path, model: torch.nn.Module, rows: list[dict[str, Any]]
) -> None:
    folder, here = write_json(tmp_path, rows), context()
    pictures = sorted((folder / "OCRBench_Images").iterdir())
    for mode, size, path in zip(
        ("L", "1", "P", "RGBA", "LA"), ((900, 30), (3, 2), (7, 999), (1, 1), (20, 20)), pictures, strict=False
    ):
        Image.new(mode, size).save(path)
    Image.new("CMYK", (50, 40)).save(pictures[5], "tiff")
    run(OCRBench(str(folder)), model, here)
    assert (len(here.records), here.problems) == (10, [])


def test_images_that_cannot_be_used_are_named_and_the_rest_is_asked(
    tmp_path: Path, model: torch.nn.Module, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = write_json(tmp_path, rows), context()
    pictures = folder / "OCRBench_Images"
    (pictures / "5.png").write_bytes((pictures / "5.png").read_bytes()[:60])
    (pictures / "6.png").unlink()
    Image.new("RGB", (500, 400)).save(pictures / "7.png")
    Image.new("RGB", (20, 18)).save(pictures / "8.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 500 * 400 - 1)
    found = run(OCRBench(str(folder)), model, here)
    assert found["ocrbench_share"] == Value(6 / 7, 7)
    missing, truncated, huge = here.problems
    assert missing == "OCRBench.json: entry 6: no image 6.png"
    assert truncated.startswith(f"{pictures / '5.png'}: not a readable image (")
    assert huge == f"{pictures / '7.png'}: 500x400 pixels; at most 199999 are read"
    monkeypatch.undo()
    here = context()
    assert run(OCRBench(str(folder), resize=False), model, here)["ocrbench_share"].n == 6
    assert [line.split(": ", 1)[1] for line in here.problems[2:]] == [
        "500x400 pixels; sides must be multiples of 4, at most 20, or resize=true",
        "20x18 pixels; sides must be multiples of 4, at most 20, or resize=true",
    ]
    here = context()
    assert run(OCRBench(str(folder), max_tokens=110), model, here)["ocrbench_share"].n == 0
    assert here.problems[-1].endswith(" tokens of image and question, 100 of the answer; max_tokens=110")


@pytest.mark.parametrize(
    ("size", "largest", "fitted"),
    [
        ((20, 16), 20, (20, 16)),
        ((20, 16), None, (20, 16)),
        ((40, 32), 20, (20, 16)),
        ((1000, 10), 20, (20, 4)),
        ((3, 5), 20, (4, 4)),
        ((18, 19), 20, (16, 20)),
        ((999, 1001), None, (1000, 1000)),
        ((1, 1), 4, (4, 4)),
    ],
)
def test_sizes(size: tuple[int, int], largest: int | None, fitted: tuple[int, int]) -> None:
    assert fitted_size(*size, largest) == fitted


def official(right: int) -> list[dict[str, Any]]:
    """Records of the official set, the first `right` of them correct."""
    types = [GROUPS[group][i % len(GROUPS[group])] for group, n in OFFICIAL_COUNTS.items() for i in range(n)]
    return [{"type": kind, "correct": number < right} for number, kind in enumerate(types)]


def test_the_official_set_has_a_count_and_no_other_set_its_name() -> None:
    assert dict(scores(official(1000)))["ocrbench"] == Value(1000, 1000)
    found = dict(scores(official(750)))
    assert found == {
        "ocrbench": Value(750, 1000),
        "ocrbench/text_recognition": Value(300, 300),
        "ocrbench/scene_vqa": Value(200, 200),
        "ocrbench/document_vqa": Value(200, 200),
        "ocrbench/key_information": Value(50, 200),
        "ocrbench/handwritten_math": Value(0, 100),
    }
    for other in (official(750)[:-1], [*official(750)[:-1], {"type": "another", "correct": True}]):
        assert not any(name.split("/")[0] == "ocrbench" for name, _ in scores(other))
    assert math.isnan(dict(scores([]))["ocrbench_share"].value)


def test_what_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    monkeypatch.delenv(ASSETS, raising=False)
    with pytest.raises(MissingAsset, match=r"ocrbench: no such file; .*evaluation.benchmarks.ocrbench.path=PATH"):
        OCRBench().protocol()
    monkeypatch.setenv(ASSETS, str(tmp_path))
    folder = write_json(tmp_path / "ocrbench", rows)
    whole = OCRBench().protocol()
    json.dumps(whole)
    assert whole == OCRBench(str(folder)).protocol() == OCRBench(str(folder / "OCRBench.json")).protocol()
    assert OCRBench(resize=False).protocol() != whole
    Image.new("RGB", (4, 4)).save(folder / "OCRBench_Images" / "3.png")
    assert OCRBench().protocol() != whole
