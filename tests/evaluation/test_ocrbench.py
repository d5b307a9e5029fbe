"""The OCRBench rule on tricky cases in its three layouts, and what their readers cannot use."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from symbiotic.data.errors import DataError
from symbiotic.evaluation import images
from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.ocrbench import FORMULA_TYPE, FORMULAS, correct, read_ocrbench

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
    ("HME100k", ["a\nb"], "xab", True),
    ("", ["straße", "x,y"], "STRASSE X,Y", True),
    ("", ["İ"], "i", False),
]


@pytest.mark.parametrize(("dataset", "answers", "prediction", "right"), RULE)
def test_the_rule(dataset: str, answers: list[str], prediction: str, right: bool) -> None:
    assert correct(prediction, answers, dataset) is right


def png(color: tuple[int, int, int] = (1, 2, 3), size: tuple[int, int] = (8, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "png")
    return buffer.getvalue()


def write_json(folder: Path, rows: list[tuple[Any, ...]]) -> Path:
    (folder / "OCRBench_Images").mkdir()
    (folder / "OCRBench_Images" / "0.png").write_bytes(png())
    keys = ("dataset_name", "type", "answers")
    entries = [dict(zip(keys, row, strict=True)) | {"image_path": "0.png", "question": "q"} for row in rows]
    (folder / "OCRBench.json").write_text(json.dumps(entries))
    return folder


def write_parquet(folder: Path, rows: list[tuple[Any, ...]]) -> Path:
    image = {"bytes": png(), "path": "0.png"}
    keys = ("dataset", "question_type", "answer")
    entries = [dict(zip(keys, row, strict=True)) | {"image": image, "question": "q"} for row in rows]
    (folder / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(entries), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def write_tsv(folder: Path, rows: list[tuple[Any, ...]]) -> Path:
    with (folder / "OCRBench.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "question", "answer", "category", "more"])
        for number, (_, kind, answers) in enumerate(rows):
            image = base64.b64encode(png()).decode() if number == 0 else "0"
            writer.writerow([number, image, "q", repr(answers), kind, ""])
    return folder


@pytest.mark.parametrize("write", [write_json, write_parquet, write_tsv])
def test_the_rule_in_every_layout(tmp_path: Path, write: Any) -> None:
    """The TSV has no data sets: there a category says what is a formula."""
    cases = [case for case in RULE if case[0] in ("", FORMULAS)]
    rows = [(name, FORMULA_TYPE if name else "Doc-oriented VQA", answers) for name, answers, _, _ in cases]
    entries, problems = read_ocrbench(write(tmp_path, rows))
    assert problems == []
    assert [correct(case[2], e.answers, e.dataset_name) for case, e in zip(cases, entries, strict=True)] == [
        right for *_, right in cases
    ]
    assert [(e.type, list(e.answers)) for e in entries] == [(kind, answers) for _, kind, answers in rows]
    assert all(entry.pixels().tolist() == [[[1, 2, 3]] * 8] * 4 for entry in entries)


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
        (entry(question="half \ud800"), "entry 1: holds half a character"),
        ({"id": 1}, "entry 1: no image_path, question, answers"),
        ("text", "entry 1: must be a mapping, not str"),
    ],
)
def test_a_bad_entry_is_named_and_the_others_are_read(folder: Path, row: Any, fault: str) -> None:
    entries, problems = read(folder, [entry(id=0), row, entry(id=2)])
    assert [e.id for e in entries] == ["0", "2"]
    assert len(problems) == 1
    assert problems[0].startswith(f"bench.json: {fault}")


@pytest.mark.parametrize("answer", [math.nan, math.inf, True, ["4", False]])
def test_an_answer_that_is_no_text_and_no_number_is_named(folder: Path, answer: Any) -> None:
    entries, problems = read(folder, [entry(id=0), entry(answers=answer), entry(id=2, answers=[7, 1.5])])
    assert [e.answers for e in entries[1:]] == [("7", "1.5")]
    assert problems == [
        f"bench.json: entry 1: answers {answer!r}; must be a text, a number or a list of them, none empty"
    ]


@pytest.mark.parametrize("content", ["[1, 2", "{}", "\xff"])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"bench\.json"):
        read_ocrbench(tmp_path / "bench.json")


IMAGE = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1\tno base64!\tq\t['a']\tc", "image 'no base64!'; must be base64, or the index of a row above"),
        ("1\t\tq\t['a']\tc", "no image"),
        ("1\t7\tq\t['a']\tc", "image '7'; must be"),
        (f"1\t{IMAGE}\tq\ta b\tc", "answer 'a b'; must be a Python list of texts"),
        (f"1\t{IMAGE}\tq\t__import__('os')\tc", "answer "),
        (f"1\t{IMAGE}\tq\t[]\tc", "answers []; must be"),
        (f"1\t{IMAGE}\tq\t['a', None]\tc", "answers ['a', None]; must be"),
        (f"1\t{IMAGE}\tq\tTrue\tc", "answers True; must be"),
        (f"1\t{IMAGE}\tq\t['a']", "4 fields; must be 5"),
        (f'1\t{IMAGE}\t"never closed\t[1]\tc', "unexpected end of data"),
        (f"1\t{IMAGE}\tq\udcff\t['a']\tc", "not UTF-8"),
    ],
)
def test_a_bad_line_of_a_tsv_is_named_and_the_others_are_read(tmp_path: Path, line: str, fault: str) -> None:
    lines = ["index\timage\tquestion\tanswer\tcategory", f"0\t{IMAGE}\tq\t['a', 5]\tc", line, f"2\t{IMAGE}\tq\t7\tc"]
    (tmp_path / "x.tsv").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    entries, problems = read_ocrbench(tmp_path / "x.tsv")
    assert [(e.id, e.answers) for e in entries] == [("0", ("a", "5")), ("2", ("7",))]
    assert len(problems) == 1
    assert problems[0].startswith(f"x.tsv: entry 1: {fault}")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"image": {"bytes": None, "path": "0.png"}}, "no image"),
        ({"image": None}, "no image"),
        ({"answer": []}, "answers []"),
        ({"answer": None}, "answers None"),
        ({"question": None}, "question None; must be a text"),
    ],
)
def test_a_bad_row_of_a_table_is_named_and_the_others_are_read(tmp_path: Path, change: Any, fault: str) -> None:
    good = {
        "dataset": "d",
        "question_type": "t",
        "question": "q",
        "answer": ["a"],
        "image": {"bytes": png(), "path": ""},
    }
    parquet.write_table(pyarrow.Table.from_pylist([good, good | change, good]), tmp_path / "x.parquet")
    entries, problems = read_ocrbench(tmp_path)
    assert [e.id for e in entries] == ["0", "2"]
    assert len(problems) == 1
    assert problems[0].startswith(f"x.parquet: entry 1: {fault}")


def test_files_of_no_layout_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no OCRBench\.json, no \*\.parquet"):
        read_ocrbench(tmp_path)
    (tmp_path / "x.tsv").write_text("index\timage\tanswer\n")
    with pytest.raises(DataError, match=r"x\.tsv: no column question, category"):
        read_ocrbench(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet: not a readable parquet file"):
        read_ocrbench(tmp_path)
    parquet.write_table(pyarrow.table({"question": ["q"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: no column answer, image"):
        read_ocrbench(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_a_name_that_no_file_can_have(folder: Path, name: str) -> None:
    entries, problems = read(folder, [entry(image_path=name), entry()])
    assert len(entries) == 1
    assert problems[0].startswith("bench.json: entry 0: no image ")


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
