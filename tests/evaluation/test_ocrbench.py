"""The OCRBench rule on tricky cases, and the reader of its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from symbiotic.data.errors import DataError
from symbiotic.evaluation import images
from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.ocrbench import correct, read_ocrbench

RULE = [  # data set, answers, prediction, right?
    ("", ["CENTRE"], "centre", True),
    ("", ["centre"], "The word is CENTRE.", True),
    ("", ["centre"], "cent re", False),
    ("", ["a b"], "x a\nb y", True),
    ("", ["a\nb"], "a b", True),
    ("", ["  a b  "], "a b", True),
    ("", ["a b"], "ab", False),
    ("", ["a  b"], "a b", False),
    ("", ["12"], "312", True),
    ("", ["1", "2"], "2", True),
    ("", ["1", "2"], "3", False),
    ("", ["3.5"], "3,5", False),
    ("", ["x"], "", False),
    ("", ["$5.00"], "total: $5.00\n", True),
    ("HME100k", ["\\frac { 1 } { 2 }"], "\\frac{1}{2}", True),
    ("HME100k", ["\\frac{1}{2}"], " \\frac { 1 }\n{ 2 } ", True),
    ("HME100k", ["X + y"], "x+y", False),
    ("HME100k", ["X + y"], "X+y=3", True),
    ("HME100K", ["X + y"], "x + y", True),
    ("HME100k", ["x"], "", False),
]


@pytest.mark.parametrize(("dataset", "answers", "prediction", "right"), RULE)
def test_the_rule(dataset: str, answers: list[str], prediction: str, right: bool) -> None:
    assert correct(prediction, answers, dataset) is right


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 4), (1, 2, 3)).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path


def entry(**changes: Any) -> dict[str, Any]:
    base = {"dataset_name": "d", "id": 7, "image_path": "images/0.png", "question": "q", "answers": "a", "type": "t"}
    return base | changes


def read(folder: Path, rows: Any) -> Any:
    (folder / "bench.json").write_text(json.dumps(rows))
    return read_ocrbench(folder / "bench.json")


def test_answers_may_be_a_text_a_list_or_a_number(folder: Path) -> None:
    entries, problems = read(folder, [entry(), entry(answers=["a", "b"]), entry(answers=5), entry(answers=["1", 2])])
    assert problems == []
    assert [e.answers for e in entries] == [("a",), ("a", "b"), ("5",), ("1", "2")]
    assert (entries[0].id, entries[0].dataset_name, entries[0].type) == ("7", "d", "t")
    assert load_image(entries[0].image).tolist() == [[[1, 2, 3]] * 8] * 4


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (entry(image_path="images/9.png"), "entry 1: no image images/9.png"),
        (entry(image_path="../secret.png"), "entry 1: image_path '../secret.png' leaves the folder"),
        (entry(image_path="/etc/passwd"), "entry 1: image_path '/etc/passwd' leaves the folder"),
        (entry(answers=[]), "entry 1: answers []; must be"),
        (entry(answers=["a", ""]), "entry 1: answers"),
        (entry(answers=None), "entry 1: answers None"),
        (entry(answers={"a": 1}), "entry 1: answers"),
        (entry(question=5), "entry 1: question and image_path must be texts"),
        ({"id": 1}, "entry 1: no image_path, question, answers"),
        ("text", "entry 1: must be a mapping, not str"),
    ],
)
def test_a_bad_entry_is_named_and_the_others_are_read(folder: Path, row: Any, fault: str) -> None:
    entries, problems = read(folder, [entry(id=0), row, entry(id=2)])
    assert [e.id for e in entries] == ["0", "2"]
    assert len(problems) == 1
    assert problems[0].startswith(f"bench.json: {fault}")


@pytest.mark.parametrize("content", ["[1, 2", "{}", "\xff"])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"bench\.json"):
        read_ocrbench(tmp_path / "bench.json")


def test_images_of_any_mode_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK", "I;16"):
        Image.new(mode, (5, 3)).save(tmp_path / "x.tiff")
        assert load_image(tmp_path / "x.tiff").shape == (3, 5, 3)
        assert load_image(tmp_path / "x.tiff").dtype == np.uint8


def test_images_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"broken.png: not a readable image"):
        load_image(folder / "images" / "broken.png")
    with pytest.raises(DataError, match=r"none.png: no such image"):
        load_image(folder / "none.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 31)
    with pytest.raises(DataError, match="8x4 pixels; at most 31"):
        load_image(folder / "images" / "0.png")


def test_the_corpus_is_read_whole(corpus: Path) -> None:
    entries, problems = read_ocrbench(corpus / "benchmarks" / "reading" / "reading.json")
    assert (len(entries), problems) == (12, [])
    assert all(correct(answer.upper(), e.answers, e.dataset_name) for e in entries for answer in e.answers)
