"""T2I-CompBench (arXiv 2307.06350) and its ++ (2025): attributes, relations, counts; each category has its own judge.

Known from the authors' scripts: the images' names, which carry the prompt (the judges read it there, up to the first
underscore) and a number that counts through the category; where each judge writes, and what.

    exports/t2i_compbench/color/samples/{prompt}_{number:06d}.png
    exports/t2i_compbench/color/annotation_blip/vqa_result.json     [{"question_id": number, "answer": "0.8431"}, …]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError
from symbiotic.evaluation.assets import asset, at_least
from symbiotic.evaluation.benchmark import MissingAsset, Record, Value, mean
from symbiotic.evaluation.composition import (
    MAX_NAME,
    Composition,
    Prompt,
    in_order,
    number_in,
    place,
    read_text,
)
from symbiotic.evaluation.context import Gallery
from symbiotic.evaluation.ocrbench import read_json_list
from symbiotic.schema import ConfigError, near_miss

KEY = "evaluation.benchmarks.t2i_compbench"
PROMPTS_FROM = "its authors publish them as examples/dataset/*_val.txt in Karine-Huang/T2I-CompBench"
JUDGES = {
    "color": ("BLIPvqa_eval/BLIP_vqa.py", "annotation_blip"),
    "shape": ("BLIPvqa_eval/BLIP_vqa.py", "annotation_blip"),
    "texture": ("BLIPvqa_eval/BLIP_vqa.py", "annotation_blip"),
    "spatial": ("UniDet_eval/2D_spatial_eval.py", "labels/annotation_obj_detection_2d"),
    "3d_spatial": ("UniDet_eval/3D_spatial_eval.py", "labels/annotation_obj_detection_3d"),
    "numeracy": ("UniDet_eval/numeracy_eval.py", "annotation_num"),
    "non_spatial": ("CLIPScore_eval/CLIP_similarity.py", "annotation_clip"),
    "complex": ("3_in_1_eval/3_in_1.py", "annotation_3_in_1"),
}
"""Category -> its judge, and the folder that this writes vqa_result.json in."""


class T2ICompBench(Composition):
    """`t2i_compbench/{category}`: the mean of its judge's answers. There is no score over categories.

    Args:
        prompts: a folder of {category}_val.txt; null: `t2i_compbench/` of the assets.
        images: of each prompt; the authors' 10, which their judge of `complex` counts on.
        categories: null: all whose file is there. Scores appear when all of them have been judged.
    """

    name = "t2i_compbench"

    def __init__(self, prompts: str | None = None, images: int = 10, categories: Sequence[str] | None = None) -> None:
        at_least(KEY, 1, images=images)
        if isinstance(categories, str):
            raise ConfigError(f"{KEY}.categories={categories}: must be a list: [{categories}]")
        for category in categories or ():
            if category not in JUDGES:
                raise ConfigError(f"{KEY}.categories: {category}: no such category; {near_miss(category, JUDGES)}")
        self.prompts, self.images, self.categories = prompts, images, categories

    def files(self) -> list[Path]:
        folder = asset(self.prompts, "t2i_compbench", key=f"{KEY}.prompts", how=PROMPTS_FROM)
        files = {category: folder / f"{category}_val.txt" for category in self.categories or JUDGES}
        found = [path for path in files.values() if path.is_file()]
        lacking = [path.name for path in files.values() if not path.is_file()] if self.categories else []
        if lacking or not found:
            raise MissingAsset(f"{folder}: no {' '.join(lacking) or '*_val.txt'} in it; {PROMPTS_FROM}")
        return found

    def read(self) -> tuple[list[Prompt], list[str]]:
        prompts: list[Prompt] = []
        problems: list[str] = []
        for path in self.files():
            category, index = path.stem.removesuffix("_val"), 0
            for number, line in enumerate(read_text(path).splitlines(), 1):
                text = line.split("\t")[0]
                fault = unnameable(text)
                if fault:
                    problems.append(f"{path.name}: line {number}: {fault}")
                else:
                    prompts.append(Prompt(f"{category}/{index}", text, {"category": category, "index": index}))
                    index += 1
        return prompts, problems

    def export(self, prompts: Sequence[Prompt], gallery: Gallery, folder: Path) -> None:
        for i, prompt in enumerate(prompts):
            for j in range(self.images):
                number = prompt.facts["index"] * self.images + j
                samples = folder / prompt.facts["category"] / "samples"
                place(gallery.path(i * self.images + j), samples / f"{prompt.text}_{number:06d}.png")

    def result_files(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        paths = {name: folder / name / JUDGES[name][1] / "vqa_result.json" for name in categories_of(prompts)}
        waiting = [name for name, path in paths.items() if not path.is_file()]
        if waiting:
            judges = ", ".join(f"{JUDGES[name][0]} on $EXPORT/{name}" for name in waiting)
            raise self.not_yet(str(paths[waiting[0]].relative_to(folder)), folder, f"T2I-CompBench's {judges}")
        return list(paths.values())

    def results(self, prompts: Sequence[Prompt], files: Sequence[Path]) -> list[Record]:
        records: list[Record] = []
        for path, (name, texts) in zip(files, categories_of(prompts).items(), strict=True):
            images = {str(i): texts[i // self.images] for i in range(len(texts) * self.images)}
            records += read_answers(path, name, images)
        return records

    def scores(self, records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
        categories: dict[str, list[float]] = {}
        for record in records:
            categories.setdefault(record["category"], []).append(record["score"])
        yield from ((f"{self.name}/{name}", mean(scores)) for name, scores in categories.items())


def categories_of(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Category -> its prompts."""
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        found.setdefault(prompt.facts["category"], []).append(prompt.text)
    return found


def unnameable(prompt: str) -> str | None:
    """Why the official names cannot carry a prompt; None where they can."""
    if not prompt.strip():
        return "no prompt"
    if "_" in prompt or "/" in prompt or "\0" in prompt:
        return f"{prompt!r}: a prompt that names its images can hold no / and no _"
    if len(f"{prompt}_000000.png".encode()) > MAX_NAME:
        return f"{prompt[:40]!r}…: a prompt that names its images has at most {MAX_NAME - 11} bytes"
    return None


def read_answers(path: Path, category: str, images: Mapping[str, str]) -> list[Record]:
    """One record an image. images: its number -> its prompt. Raises DataError."""

    def found() -> Iterator[tuple[str, str, Record]]:
        for i, row in enumerate(read_json_list(path)):
            where = f"{path}: item {i}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: must be a mapping with question_id and answer")
            number = str(row.get("question_id"))
            record: dict[str, Any] = {"id": f"{category}/{number}", "category": category}
            score = number_in(where, row, "answer", low=-1)  # cosines of non_spatial may be negative
            yield where, number, {**record, "prompt": images.get(number), "score": score}

    return in_order(path, images, found())
