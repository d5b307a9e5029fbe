"""Reader of the official MMLU layout (hendrycks CSV): `{subject}_{dev|val|test}.csv`, no header,
`question,A,B,C,D,letter`.

Everything is text: a choice "None" or "NA" is data. A row that is no question is named and left out, the rows
behind it are read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from symbiotic.data.errors import DataError, readable_errors

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A four-choice question; `answer` is the number of the right choice, 0 to 3."""

    subject: str
    row: int  # in its file, from 1, counted in records
    question: str
    choices: tuple[str, str, str, str]
    answer: int


def read_mmlu(folder: str | Path, split: str, subjects: tuple[str, ...] = ()) -> tuple[list[Question], list[str]]:
    """All questions of a split, subjects in alphabetical order, and one line for every row that is none.

    Args:
        split: `dev`, `val` or `test`. subjects: only these, in this order.

    Raises:
        DataError: no file of that split, or one of the named subjects is missing.
    """
    folder = Path(folder)
    found = {path.name.removesuffix(f"_{split}.csv"): path for path in folder.glob(f"*_{split}.csv")}
    missing = [subject for subject in subjects if subject not in found]
    if missing or not found:
        raise DataError(f"{folder}: no file {missing[0] if missing else '*'}_{split}.csv")
    questions: list[Question] = []
    problems: list[str] = []
    for subject in subjects or sorted(found):
        for row, fields, fault in _rows(found[subject]):
            item = fault or _question(subject, row, fields)
            if isinstance(item, Question):
                questions.append(item)
            else:
                problems.append(f"{found[subject].name}: row {row}: {item}")
    return questions, problems


def _question(subject: str, row: int, fields: list[str]) -> Question | str:
    if len(fields) != 6:
        return f"{len(fields)} fields; must be 6 (question,A,B,C,D,letter)"
    letter = fields[5].strip()
    if len(letter) != 1 or letter not in LETTERS:
        return f"answer {letter!r}; must be one of A, B, C, D"
    if any("\udc80" <= sign <= "\udcff" for field in fields for sign in field):
        return "not UTF-8"
    a, b, c, d = fields[1:5]
    return Question(subject, row, fields[0], (a, b, c, d), LETTERS.index(letter))


def _rows(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """(record number, fields, what is wrong with it). After a broken record that swallowed several lines, such as
    one with a quote that never closes, reading goes on at the line behind its first."""
    with readable_errors("read", path):
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    start = row = 0
    while start < len(lines):
        reader = csv.reader(lines[start:], strict=True)
        for fields, fault, used in _records(reader):
            broken = bool(fault) or len(fields) != 6
            if fields or fault:
                row += 1
                yield row, fields, fault
            end = start + reader.line_num
            if broken and used > 1:
                start = end - used + 1
                break
        else:
            start = len(lines)


def _records(reader: csv._reader) -> Iterator[tuple[list[str], str, int]]:  # type: ignore[name-defined]
    """(fields, fault, lines used) of each record; a faulty one is reported, not raised."""
    while True:
        before = reader.line_num
        try:
            yield next(reader), "", reader.line_num - before
        except StopIteration:
            return
        except csv.Error as error:
            yield [], str(error), reader.line_num - before
