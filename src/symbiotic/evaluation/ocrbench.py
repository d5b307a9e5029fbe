"""OCRBench v1: its rule, its groups, and readers of its three layouts.

    official JSON      OCRBench.json: a list of {dataset_name, id, image_path, question, answers: str | list, type};
                       image_path is relative to a folder of images: OCRBench_Images/ beside it, or its own folder
    echo840 parquet    dataset, question, question_type, answer: list, image: {bytes, path}
    VLMEvalKit TSV     index, image (base64, or the index of the row that has it), question, answer (a Python literal),
                       category; a category takes the place of the data set in the rule

An entry that cannot be used is named and left out.
"""

from __future__ import annotations

import ast
import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.tables import halved, parquet_rows, parse_json, text_rows

FORMULAS = "HME100k"
FORMULA_TYPE = "Handwritten Mathematical Expression Recognition"
GROUPS = {
    "text_recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    "scene_vqa": ("Scene Text-centric VQA",),
    "document_vqa": ("Doc-oriented VQA",),
    "key_information": ("Key Information Extraction",),
    "handwritten_math": (FORMULA_TYPE,),
}
"""Group -> the `type`s in it."""
OFFICIAL_COUNTS = dict(zip(GROUPS, (300, 200, 200, 200, 100), strict=True))
GROUP_OF = {kind: group for group, kinds in GROUPS.items() for kind in kinds}


@dataclass(frozen=True)
class Entry:
    """A question about an image, which is a file or the bytes of one. `where`: what messages call the image."""

    dataset_name: str
    id: str
    image: Path | bytes
    question: str
    answers: tuple[str, ...]
    type: str
    where: str = ""

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError, as `load_image`."""
        return load_image(self.image, self.where)


def correct(prediction: str, answers: Sequence[str], dataset_name: str = "") -> bool:
    """OCRBench v1: right if any normalised answer is a substring of the normalised prediction.

    HME100k (formulas) loses all spaces and keeps its case; everything else is lowered. Newlines become spaces.
    """
    return any(_normal(answer, dataset_name) in _normal(prediction, dataset_name) for answer in answers)


def _normal(text: str, dataset_name: str) -> str:
    if dataset_name == FORMULAS:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")


def read_ocrbench(path: str | Path, images: str | Path | None = None) -> tuple[list[Entry], list[str]]:
    """All usable entries in the order of the file, and one line for every other one.

    Args:
        path: a file of one of the layouts, or a folder with one.
        images: of a JSON file, the folder that `image_path` is relative to.

    Raises:
        DataError: no such file, or it is in none of the layouts.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    for file in ocrbench_files(path):
        read = {".json": _of_json, ".parquet": _of_parquet}.get(file.suffix, _of_tsv)
        for number, item in enumerate(read(file, Path(images) if images is not None else None)):
            if isinstance(item, Entry):
                entries.append(item)
            else:
                problems.append(f"{file.name}: entry {number}: {item}")
    return entries, problems


def ocrbench_files(path: str | Path) -> list[Path]:
    """The file, or those of the layout that a folder has: JSON, parquet (in data/ too), TSV.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    for pattern in ("OCRBench.json", "*.parquet", "data/*.parquet", "*.tsv"):
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith("."))
        if found:
            return found
    raise DataError(f"{path}: no OCRBench.json, no *.parquet (in it or in data/) and no *.tsv")


def read_json_list(path: Path) -> list[Any]:
    """Raises DataError: not a JSON file that holds a list."""
    with readable_errors("read", path):
        raw = path.read_bytes()
    try:
        rows = parse_json(raw)
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a JSON list of entries, not {type(rows).__name__}")
    return rows


# --------------------------------------------------------------------------- the three layouts


def _of_json(path: Path, images: Path | None) -> Iterator[Entry | str]:
    folder = images or image_folder(path, "OCRBench_Images")
    for row in read_json_list(path):
        fault = missing_keys(row, ("image_path", "question", "answers"))
        yield fault or _json_entry(row, folder)


def image_folder(path: Path, name: str) -> Path:
    """The folder of that name beside a file, or the file's own."""
    beside = path.parent / name
    return beside if beside.is_dir() else path.parent


def missing_keys(row: Any, keys: Sequence[str]) -> str:
    """What is wrong with an entry that is no mapping or lacks a key."""
    if not isinstance(row, dict):
        return f"must be a mapping, not {type(row).__name__}"
    missing = [key for key in keys if key not in row]
    return f"no {', '.join(missing)}" if missing else ""


def _json_entry(row: Mapping[str, Any], folder: Path) -> Entry | str:
    answers = _answers(row["answers"])
    if isinstance(answers, str):
        return answers
    if not isinstance(row["question"], str) or not isinstance(row["image_path"], str):
        return "question and image_path must be texts"
    if halved(json.dumps(row, ensure_ascii=False, default=str)):
        return "holds half a character"
    image = image_in(folder, row["image_path"])
    if isinstance(image, str):
        return image
    name, kind = (str(row.get(key, "")) for key in ("dataset_name", "type"))
    return Entry(name, str(row.get("id", "")), image, row["question"], answers, kind, str(image))


def image_in(folder: Path, name: str) -> Path | str:
    """The image of that name in a folder, or what is wrong with it."""
    image = folder / name
    try:
        if not image.resolve().is_relative_to(folder.resolve()):
            return f"image_path {name!r} leaves the folder of images"
        return image if image.is_file() else f"no image {name}"
    except (OSError, ValueError):  # a name that no file can have
        return f"no image {name[:80]!r}"


def _of_parquet(path: Path, images: Path | None = None) -> Iterator[Entry | str]:
    columns = ("question", "answer", "image")
    for number, row in enumerate(parquet_rows(path, columns, ("dataset", "question_type"))):
        yield row if isinstance(row, str) else _parquet_entry(row, number, path)


def _parquet_entry(row: Mapping[str, Any], number: int, path: Path) -> Entry | str:
    answers = _answers(row["answer"])
    if isinstance(answers, str):
        return answers
    image = row["image"].get("bytes") if isinstance(row["image"], dict) else row["image"]
    if not isinstance(image, bytes) or not image:
        return "no image: must be the bytes of an image file"
    if not isinstance(row["question"], str):
        return f"question {row['question']!r}; must be a text"
    name, kind = (str(row.get(key) or "") for key in ("dataset", "question_type"))
    return Entry(name, str(number), image, row["question"], answers, kind, f"{path.name}: entry {number}: image")


def _of_tsv(path: Path, images: Path | None = None) -> Iterator[Entry | str]:
    rows = text_rows(path, delimiter="\t")
    header = next(rows, (0, [], ""))[1]
    missing = [name for name in ("index", "image", "question", "answer", "category") if name not in header]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; its first line must name them, with tabs between")
    seen: dict[str, bytes] = {}  # an image that belongs to several rows stands in the first of them
    for number, (_, fields, fault) in enumerate(rows):
        yield fault or _tsv_entry(dict(zip(header, fields, strict=True)), f"{path.name}: entry {number}: image", seen)


def _tsv_entry(row: Mapping[str, str], where: str, seen: dict[str, bytes]) -> Entry | str:
    image = seen.get(row["image"]) or _decoded(row["image"])
    if isinstance(image, str):
        return image
    seen[row["index"]] = image
    try:
        given = ast.literal_eval(row["answer"])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return f"answer {row['answer']!r}; must be a Python list of texts"
    answers = _answers(given)
    if isinstance(answers, str):
        return answers
    kind = row["category"]
    name = row.get("dataset_name") or (FORMULAS if kind == FORMULA_TYPE else "")
    return Entry(name, row["index"], image, row["question"], answers, kind, where)


def _decoded(text: str) -> bytes | str:
    try:
        return base64.b64decode(text, validate=True) or "no image"
    except ValueError:
        return f"image {text[:20]!r}; must be base64, or the index of a row above"


def is_number(value: Any) -> bool:
    """A finite one; no truth value, which Python takes for a number."""
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def _answers(given: Any) -> tuple[str, ...] | str:
    """The accepted answers; what is wrong with them, as a text."""
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    answers = tuple(str(answer) for answer in listed if isinstance(answer, str) or is_number(answer))
    if len(answers) != len(listed) or not all(answer.strip() for answer in answers) or not answers:
        return f"answers {given!r}; must be a text, a number or a list of them, none empty"
    return answers
