"""The official OCRBench v1 layout (one JSON file and a folder of images) and its rule.

An entry is `{dataset_name, id, image_path, question, answers: str | list, type}`; `image_path` is relative to the
folder of images. An entry that cannot be used is named and left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError, readable_errors


@dataclass(frozen=True)
class Entry:
    dataset_name: str
    id: str
    image: Path
    question: str
    answers: tuple[str, ...]
    type: str


def correct(prediction: str, answers: Sequence[str], dataset_name: str = "") -> bool:
    """OCRBench v1: right if any normalised answer is a substring of the normalised prediction.

    HME100k (formulas) loses all spaces and keeps its case; everything else is lowered. Newlines become spaces.
    """
    return any(_normal(answer, dataset_name) in _normal(prediction, dataset_name) for answer in answers)


def _normal(text: str, dataset_name: str) -> str:
    if dataset_name == "HME100k":
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")


def read_ocrbench(path: str | Path, images: str | Path | None = None) -> tuple[list[Entry], list[str]]:
    """All usable entries of the JSON file in its order, and one line for every other one.

    Args:
        images: folder that `image_path` is relative to; by default the folder of the JSON file.

    Raises:
        DataError: no such file, or it is no JSON list.
    """
    path = Path(path)
    with readable_errors("read", path):
        raw = path.read_bytes()
    try:
        rows = json.loads(raw)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a JSON list of entries, not {type(rows).__name__}")
    entries: list[Entry] = []
    problems: list[str] = []
    for number, row in enumerate(rows):
        item = _entry(row, Path(images) if images is not None else path.parent)
        if isinstance(item, Entry):
            entries.append(item)
        else:
            problems.append(f"{path.name}: entry {number}: {item}")
    return entries, problems


def _entry(row: Any, images: Path) -> Entry | str:
    if not isinstance(row, dict):
        return f"must be a mapping, not {type(row).__name__}"
    missing = [key for key in ("image_path", "question", "answers") if key not in row]
    if missing:
        return f"no {', '.join(missing)}"
    given = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
    answers = tuple(str(answer) for answer in given if isinstance(answer, (str, int, float)))
    if len(answers) != len(given) or not all(answer.strip() for answer in answers) or not answers:
        return f"answers {row['answers']!r}; must be a text or a list of texts, none empty"
    if not isinstance(row["question"], str) or not isinstance(row["image_path"], str):
        return "question and image_path must be texts"
    image = images / row["image_path"]
    if not image.resolve().is_relative_to(images.resolve()):
        return f"image_path {row['image_path']!r} leaves the folder of images"
    if not image.is_file():
        return f"no image {row['image_path']}"
    name, kind = (str(row.get(key, "")) for key in ("dataset_name", "type"))
    return Entry(name, str(row.get("id", "")), image, row["question"], answers, kind)
