"""The MMLU readers: everything is text, both layouts say the same, and a bad row takes no other row with it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from symbiotic.data.errors import DataError
from symbiotic.evaluation.mmlu import Question, read_mmlu

TRICKY = [
    ["Which is none?", "None", "NA", "null", "nan", "A"],
    ["Commas, and\nnew lines", "1,000", "2,000", " 3", "", "D"],
    ['He said "no"', '"', "''", 'a"b', "c", "B"],
    ["Ünïcode – 数学 ∑", "é", "ß", "λ", "🙂", "C"],
    ["True", "False", "0", "1.0", "1e5", "D"],
]


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_tricky_cells_are_read_as_written(tmp_path: Path) -> None:
    write(tmp_path / "odd_test.csv", TRICKY)
    questions, problems = read_mmlu(tmp_path, "test")
    assert problems == []
    assert [[q.question, *q.choices, "ABCD"[q.answer]] for q in questions] == TRICKY


def test_agrees_with_pandas_as_the_official_script_reads(tmp_path: Path) -> None:
    write(tmp_path / "odd_test.csv", TRICKY)
    frame = pandas.read_csv(tmp_path / "odd_test.csv", header=None, keep_default_na=False, dtype=str)
    questions, _ = read_mmlu(tmp_path, "test")
    assert [[q.question, *q.choices, "ABCD"[q.answer]] for q in questions] == frame.to_numpy().tolist()


def test_splits_and_subjects(tmp_path: Path) -> None:
    for name in ("b_test", "a_test", "a_b_test", "a_dev", "a_val"):
        write(tmp_path / f"{name}.csv", [[name, "1", "2", "3", "4", "A"]])
    assert [q.subject for q in read_mmlu(tmp_path, "test")[0]] == ["a", "a_b", "b"]
    assert [q.question for q in read_mmlu(tmp_path, "dev")[0]] == ["a_dev"]
    assert [q.subject for q in read_mmlu(tmp_path, "test", ("b", "a"))[0]] == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("only,three,fields", "row 2: 3 fields; must be 6"),
        ("q,1,2,3,4,E", "row 2: answer 'E'; must be one of A, B, C, D"),
        ("q,1,2,3,4,", "row 2: answer ''"),
        ("q,1,2,3,4,a", "row 2: answer 'a'"),
        ("q,1,2,3,4,5,A", "row 2: 7 fields"),
        ('q,"never closed,2,3,4,A', "row 2: "),
        ('"never closed,1,2,3,4,A', "row 2: "),
        ("q\udcff,1,2,3,4,A", "row 2: not UTF-8"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, line: str, fault: str) -> None:
    good = [f"q{i},1,2,3,4,{letter}" for i, letter in enumerate("ABCD")]
    text = "\n".join([good[0], line, *good[1:]]) + "\n"
    (tmp_path / "s_test.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    questions, problems = read_mmlu(tmp_path, "test")
    assert [q.question for q in questions] == ["q0", "q1", "q2", "q3"]
    assert [q.answer for q in questions] == [0, 1, 2, 3]
    assert len(problems) == 1
    assert problems[0].startswith(f"s_test.csv: {fault}")


def test_an_open_quote_and_a_later_quoted_row(tmp_path: Path) -> None:
    text = 'q0,1,2,3,4,A\n"open,1,2,3,4,A\nq2,"x, y",2,3,4,B\n"q3 ""so""",1,2,3,4,C\n'
    (tmp_path / "s_test.csv").write_text(text)
    questions, problems = read_mmlu(tmp_path, "test")
    assert [q.question for q in questions] == ["q0", "q2", 'q3 "so"']
    assert questions[1].choices[0] == "x, y"
    assert len(problems) == 1


def test_blank_lines_marks_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "s_test.csv").write_bytes(b"\xef\xbb\xbfq0,1,2,3,4,A\r\n\r\nq1,1,2,3,4,B")
    assert read_mmlu(tmp_path, "test") == (
        [Question("s", 1, "q0", ("1", "2", "3", "4"), 0), Question("s", 2, "q1", ("1", "2", "3", "4"), 1)],
        [],
    )


SUBJECTS = {"anatomy": TRICKY, "virology": TRICKY[::-1]}


def table(path: Path, subjects: dict[str, list[list[str]]], **more: Any) -> None:
    """A file in the layout of cais/mmlu."""
    rows = [(subject, *row) for subject, found in subjects.items() for row in found]
    columns = {
        "question": [row[1] for row in rows],
        "subject": [row[0] for row in rows],
        "choices": [list(row[2:6]) for row in rows],
        "answer": ["ABCD".index(row[6]) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns | more), path)


@pytest.mark.parametrize(
    "place", ["{s}_test.csv", "test/{s}_test.csv", "data/test/{s}_test.csv", "{s}/test-0-of-1.parquet", "all", "."]
)
def test_every_layout_says_the_same(tmp_path: Path, place: str) -> None:
    if "{s}" not in place:
        table(tmp_path / place / "test-00000-of-00001.parquet", SUBJECTS)
        table(tmp_path / place / "auxiliary_train-00000-of-00001.parquet", {"": TRICKY})
    for subject, rows in SUBJECTS.items():
        path = tmp_path / place.format(s=subject)
        if path.suffix == ".csv":
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, rows)
        elif path.suffix == ".parquet":
            table(path, {subject: rows})
    questions, problems = read_mmlu(tmp_path, "test")
    assert problems == []
    found = [[q.subject, q.question, *q.choices, "ABCD"[q.answer]] for q in questions]
    assert found == [[subject, *row] for subject, rows in SUBJECTS.items() for row in rows]


def test_all_is_taken_once_and_splits_do_not_mix(tmp_path: Path) -> None:
    for folder, subjects in {"all": SUBJECTS, "anatomy": {"anatomy": TRICKY}}.items():
        table(tmp_path / folder / "test-00000-of-00001.parquet", subjects)
    table(tmp_path / "all" / "validation-00000-of-00001.parquet", {"anatomy": TRICKY[:2]})
    table(tmp_path / "all" / "dev-00000-of-00001.parquet", {"anatomy": TRICKY[2:]})
    assert [len(read_mmlu(tmp_path, split)[0]) for split in ("test", "val", "dev")] == [10, 2, 3]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"answer": [0, 4, 2]}, "row 2: answer 4; must be 0, 1, 2 or 3"),
        ({"answer": [0, None, 2]}, "row 2: answer None; must be"),
        ({"answer": [0.0, 1.5, 2.0]}, "row 1: answer 0.0; must be"),
        ({"choices": [list("abcd"), list("abc"), list("abcd")]}, "row 2: choices ['a', 'b', 'c']; must be 4 texts"),
        ({"choices": [list("abcd"), ["a", None, "c", "d"], list("abcd")]}, "row 2: choices"),
        ({"choices": [list("abcd"), None, list("abcd")]}, "row 2: choices None"),
        ({"question": ["a", None, "c"]}, "row 2: question None; must be a text"),
    ],
)
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    table(tmp_path / "all" / "test-0.parquet", {"anatomy": TRICKY[:3]}, **change)
    questions, problems = read_mmlu(tmp_path, "test")
    assert problems[0].startswith(f"all/test-0.parquet: {fault}")
    assert len(questions) + len(problems) == 3


def test_a_table_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path) -> None:
    for subject, rows in SUBJECTS.items():
        table(tmp_path / subject / "test-0.parquet", {subject: rows})
    (tmp_path / "anatomy" / "test-0.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    (tmp_path / "astronomy").mkdir()
    parquet.write_table(pyarrow.table({"question": ["q"]}), tmp_path / "astronomy" / "test-0.parquet")
    questions, problems = read_mmlu(tmp_path, "test")
    assert [q.subject for q in questions] == ["virology"] * 5
    assert problems[0].startswith("anatomy/test-0.parquet: not a readable parquet file (")
    assert problems[1:] == ["astronomy/test-0.parquet: no column choices, answer; it has question"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_a_question_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "virology_test.csv").write_text(content)
    assert read_mmlu(tmp_path, "test") == ([], ["virology_test.csv: no question in it"])


def test_a_damaged_piece_of_a_table_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "all" / "test-0.parquet"
    table(path, {"anatomy": TRICKY})
    content = parquet.read_table(path)
    parquet.write_table(content, path, row_group_size=2, compression="gzip", use_dictionary=False)
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 40] = bytes(40)
    path.write_bytes(damaged)
    questions, problems = read_mmlu(tmp_path, "test")
    assert [q.question for q in questions] == [TRICKY[i][0] for i in (0, 1, 4)]
    assert len(problems) == 1
    assert problems[0].startswith("all/test-0.parquet: row group 1 cannot be read (")


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file \*_test.csv"):
        read_mmlu(tmp_path, "test")
    write(tmp_path / "a_test.csv", TRICKY)
    with pytest.raises(DataError, match=r"no file b_test.csv"):
        read_mmlu(tmp_path, "test", ("a", "b"))


def test_the_corpus_is_read_whole(corpus: Path) -> None:
    for half in ("replayed", "unreplayed"):
        questions, problems = read_mmlu(corpus / "benchmarks" / "knowledge", "test", (half,))
        assert (len(questions), problems) == (96, [])
        assert {q.answer for q in questions} == {0, 1, 2, 3}
