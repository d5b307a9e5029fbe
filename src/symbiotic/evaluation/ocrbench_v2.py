"""OCRBench v2 (arXiv 2501.00321): predictions in the layout of its official scripts, and their result file read back.

The scripts need packages and a process pool of their own, so that a user runs them. Their files, checked against the
authors' repository: `eval.py` reads a JSON list of the benchmark's entries, each with `predict`, and writes the list
with a `score` in [0, 1] added to each (some with `ignore`); `get_score.py` averages these by the groups below.

    exports/ocrbench_v2/predictions.json   written here, in the folder of the evaluation
    exports/ocrbench_v2/results.json       where the output of eval.py is looked for
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.formats import reading_parts
from symbiotic.data.packing import build_sample
from symbiotic.evaluation.assets import asset, at_least, content_hash
from symbiotic.evaluation.benchmark import Benchmark, MissingAsset, Record, Value, mean
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.ocrbench import Entry, image_in, is_number, missing_keys, read_json_list
from symbiotic.evaluation.ocrbench_benchmark import check_length, largest_side, readable
from symbiotic.evaluation.prompts import MAX_TOKENS, answers
from symbiotic.evaluation.tables import halved

KEY = "evaluation.benchmarks.ocrbench_v2"
OCRBENCH_V2_FROM = "the authors' archive has OCRBench_v2.json beside EN_part/ and CN_part/"
GROUPS = {
    "en_text_recognition": ("text recognition en", "fine-grained text recognition en", "full-page OCR en"),
    "en_text_detection": ("text grounding en", "VQA with position en"),
    "en_text_spotting": ("text spotting en",),
    "en_relationship_extraction": ("key information extraction en", "key information mapping en"),
    "en_element_parsing": ("document parsing en", "chart parsing en", "table parsing en", "formula recognition en"),
    "en_mathematical_calculation": ("math QA en", "text counting en"),
    "en_visual_text_understanding": ("document classification en", "cognition VQA en", "diagram QA en"),
    "en_knowledge_reasoning": (
        "reasoning VQA en",
        "science QA en",
        "APP agent en",
        "ASCII art classification en",
    ),
    "cn_text_recognition": ("full-page OCR cn",),
    "cn_relationship_extraction": ("key information extraction cn", "handwritten answer extraction cn"),
    "cn_element_parsing": ("document parsing cn", "table parsing cn", "formula recognition cn"),
    "cn_visual_text_understanding": ("cognition VQA cn",),
    "cn_knowledge_reasoning": ("reasoning VQA cn", "text translation cn"),
}
GROUP_OF = {kind: group for group, kinds in GROUPS.items() for kind in kinds}


class Item(NamedTuple):
    """An entry of the file as it stands there, and its image."""

    row: dict[str, Any]
    image: Entry


class OCRBenchV2(Benchmark):
    """`ocrbench_v2/en` and `ocrbench_v2/cn` (means over the groups), `ocrbench_v2/{group}`, once there are results.

    Args:
        path: OCRBench_v2.json, or the folder with it; null: `ocrbench_v2/` of the assets. Images lie beside it.
        resize, max_tokens: as of `OCRBench`.
        max_new_tokens: of greedy decoding. The benchmark sets none; its longest answers are whole pages.
    """

    name = "ocrbench_v2"

    def __init__(
        self,
        path: str | None = None,
        resize: bool = True,
        max_new_tokens: int = 512,
        max_tokens: int | None = MAX_TOKENS,
    ) -> None:
        at_least(KEY, 1, max_new_tokens=max_new_tokens)
        if max_tokens is not None:
            at_least(KEY, 1, max_tokens=max_tokens)
        self.path, self.resize = path, resize
        self.max_new_tokens, self.max_tokens = max_new_tokens, max_tokens

    def found(self) -> Path:
        """Raises MissingAsset."""
        place = "ocrbench_v2/OCRBench_v2.json"
        found = asset(self.path, place, key=f"{KEY}.path", how=OCRBENCH_V2_FROM)
        return found / "OCRBench_v2.json" if found.is_dir() else found

    def protocol(self) -> Mapping[str, Any]:
        path = self.found()
        return {
            "files": content_hash(path.parent),
            "resize": self.resize,
            "max_new_tokens": self.max_new_tokens,
            "max_tokens": self.max_tokens,
            "score": "eval.py of the authors",
        }

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        if context.folder is None:
            raise MissingAsset("ocrbench_v2: no folder for its predictions; src/eval.py has one")
        items, problems = read_ocrbench_v2(self.found())
        context.problems += problems
        largest = largest_side(model)

        def pixels(item: Item) -> np.ndarray:
            return readable(item.image, largest, self.resize)

        def measure(some: Sequence[Item]) -> list[Record]:
            parts = [reading_parts(pixels(item), item.image.question, context.tokenizer) for item in some]
            samples = [build_sample(item.image.id, "mmu", part) for item, part in zip(some, parts, strict=True)]
            texts = answers(model, samples, context.tokenizer, self.max_new_tokens, len(some))
            return [described(item, text) for item, text in zip(some, texts, strict=True)]

        def check(item: Item) -> None:
            check_length(item.image, pixels(item), context.tokenizer, self.max_new_tokens, self.max_tokens)

        usable, _ = context.kept(context.chosen(items), check)
        records = context.measured(self.name, usable, measure)
        rows = [{**item.row, "predict": r["prediction"]} for item, r in zip(usable, records, strict=True)]
        results = export(rows, context.folder / "exports" / self.name)
        scored, unscored = read_results(results, rows)
        context.files.append(str(results.relative_to(context.folder)))
        context.problems += unscored
        yield from scores(scored)


def described(item: Item, prediction: str) -> Record:
    return {"id": item.image.id, "type": item.image.type, "question": item.image.question, "prediction": prediction}


def read_ocrbench_v2(path: Path) -> tuple[list[Item], list[str]]:
    """The usable entries, and one line for every other one.

    Raises:
        DataError: no such file, or no JSON list.
    """
    items: list[Item] = []
    problems: list[str] = []
    for number, row in enumerate(read_json_list(path)):
        item = missing_keys(row, ("type", "image_path", "question", "answers")) or _item(row, number, path.parent)
        if isinstance(item, Item):
            items.append(item)
        else:
            problems.append(f"{path.name}: entry {number}: {item}")
    return items, problems


def _item(row: dict[str, Any], number: int, folder: Path) -> Item | str:
    if not isinstance(row["type"], str) or row["type"] not in GROUP_OF:
        return f"type {row['type']!r} is none of OCRBench v2"
    if not isinstance(row["question"], str) or not isinstance(row["image_path"], str):
        return "question and image_path must be texts"
    if halved(json.dumps(row, ensure_ascii=False)):
        return "holds half a character"
    image = image_in(folder, row["image_path"])
    if isinstance(image, str):
        return image
    return Item(row, Entry("", str(row.get("id", number)), image, row["question"], (), row["type"], str(image)))


def export(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the predictions; returns where the results are looked for."""
    path = folder / "predictions.json"
    with readable_errors("write", path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=4) + "\n", encoding="utf-8")
    return folder / "results.json"


def read_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The scored entries, and a line for each that eval.py leaves without a score: it forgets that of an empty
    prediction of `full-page OCR en`.

    Args:
        rows: the predictions that must have been scored.

    Raises:
        MissingAsset: no such file. DataError: not the result of these predictions.
    """
    if not path.is_file():
        command = f"eval.py --input_path {path.parent / 'predictions.json'} --output_path {path}"
        raise MissingAsset(f"{path}: no such file; the official scripts write it: {command}; then evaluate again")
    found = read_json_list(path)
    if len(found) != len(rows):
        raise DataError(f"{path}: {len(found)} entries; predictions.json beside it has {len(rows)}")
    scored: list[Mapping[str, Any]] = []
    problems: list[str] = []
    for number, (result, row) in enumerate(zip(found, rows, strict=True)):
        if not isinstance(result, dict) or any(result.get(key) != row[key] for key in ("type", "question", "predict")):
            raise DataError(f"{path}: entry {number}: not the result of the prediction in predictions.json beside it")
        if "ignore" in result:
            continue
        if "score" not in result and not row["predict"].strip():
            problems.append(f"{path.name}: entry {number}: an empty prediction, which eval.py gave no score")
        elif is_number(result.get("score")):
            scored.append(result)
        else:
            raise DataError(f"{path}: entry {number}: score {result.get('score')!r}; must be a number")
    return scored, problems


def scores(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Value]]:
    """As get_score.py: means of the groups, and their means for English and Chinese."""
    groups = {group: [float(r["score"]) for r in results if GROUP_OF[r["type"]] == group] for group in GROUPS}
    for language in ("en", "cn"):
        there = [found for group, found in groups.items() if group.startswith(language) and found]
        if there:
            value = statistics.fmean(statistics.fmean(found) for found in there)
            yield f"ocrbench_v2/{language}", Value(value, sum(map(len, there)))
    for group, found in groups.items():
        if found:
            yield f"ocrbench_v2/{group}", mean(found)
