"""Readers of both official MMLU layouts, from a local folder.

    hendrycks CSV      {subject}_{dev|val|test}.csv, no header: question,A,B,C,D,letter; in the folder itself, in dev/,
                       val/, test/ below it, or in data/ as the original archive has it
    cais/mmlu parquet  {test|validation|dev}-00000-of-00001.parquet: question, subject, choices[4], answer 0 to 3; in
                       all/, in a folder per subject, or in the folder itself

Everything is text: a choice "None" or "NA" is data. A row that is no question is named and left out, the rows behind it
are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError
from symbiotic.evaluation.benchmark import MissingAsset
from symbiotic.evaluation.tables import parquet_rows, text_rows

LETTERS = "ABCD"
PARQUET_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}


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
    found: dict[str, list[Question]] = {}
    problems: list[str] = []
    for path in mmlu_files(folder, split, *subjects[:1]):
        if subjects and path.suffix == ".csv" and _subject(path) not in subjects:
            continue
        for item in _questions(path):
            if isinstance(item, Question):
                found.setdefault(item.subject, []).append(item)
            else:
                problems.append(f"{_name(path)}: {item}")
    missing = [subject for subject in subjects if subject not in found]
    if missing:
        raise DataError(f"{folder}: no questions of {missing[0]} (no file {missing[0]}_{split}.csv)")
    return [question for subject in subjects or sorted(found) for question in found[subject]], problems


def mmlu_files(folder: str | Path, split: str, subject: str = "*") -> list[Path]:
    """The files of a split, of all subjects, in whichever layout the folder has.

    Args:
        subject: what the message asks for.

    Raises:
        DataError: there is none.
    """
    folder, name = Path(folder), PARQUET_SPLITS[split]
    csv = [f"{place}*_{split}.csv" for place in ("", f"{split}/", "data/", f"data/{split}/")]
    parquet = [f"{place}{name}-*.parquet" for place in ("", "all/", "*/")]
    for pattern in csv + parquet:
        found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
        if found:
            return found
    places = f"in it or in {split}/, and no {name}-*.parquet, in it or in all/"
    raise DataError(f"{folder}: no file {subject}_{split}.csv, {places}")


def _name(path: Path) -> str:
    """Parquet files of all subjects have the same name."""
    return path.name if path.suffix == ".csv" else f"{path.parent.name}/{path.name}"


def _questions(path: Path) -> Iterator[Question | str]:
    """The questions of a file, a line for each row that is none, and one for a file without rows or that cannot be
    read."""
    empty = True
    try:
        for item in _csv_questions(path) if path.suffix == ".csv" else _parquet_questions(path):
            empty = False
            yield item
        if empty:
            yield "no question in it"
    except MissingAsset:
        raise
    except DataError as error:
        yield str(error).removeprefix(f"{path}: ")


def _subject(path: Path) -> str:
    """`high_school_physics` of high_school_physics_test.csv."""
    return path.stem.rpartition("_")[0]


def _csv_questions(path: Path) -> Iterator[Question | str]:
    for row, fields, fault in text_rows(path, columns=6):
        item = fault.replace("be 6", "be 6 (question,A,B,C,D,letter)") or _of_fields(_subject(path), row, fields)
        yield item if isinstance(item, Question) else f"row {row}: {item}"


def _of_fields(subject: str, row: int, fields: list[str]) -> Question | str:
    letter = fields[5].strip()
    if len(letter) != 1 or letter not in LETTERS:
        return f"answer {letter!r}; must be one of A, B, C, D"
    a, b, c, d = fields[1:5]
    return Question(subject, row, fields[0], (a, b, c, d), LETTERS.index(letter))


def _parquet_questions(path: Path) -> Iterator[Question | str]:
    for row, values in enumerate(parquet_rows(path, ("question", "choices", "answer"), ("subject",)), 1):
        item = values if isinstance(values, str) else _of_values(path.parent.name, row, values)
        yield item if isinstance(item, Question) or item is values else f"row {row}: {item}"


def _of_values(folder: str, row: int, values: dict[str, Any]) -> Question | str:
    question, choices, answer = (values[key] for key in ("question", "choices", "answer"))
    if not isinstance(question, str):
        return f"question {question!r}; must be a text"
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        return f"choices {choices!r}; must be 4 texts"
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < 4:
        return f"answer {answer!r}; must be 0, 1, 2 or 3"
    a, b, c, d = choices
    return Question(values.get("subject") or folder, row, question, (a, b, c, d), answer)
