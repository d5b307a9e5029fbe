"""The MMLU CSV reader: everything is text, and a bad row takes no other row with it."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas
import pytest

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
