"""WISE (arXiv 2503.07265): prompts that need knowledge of the world, judged by GPT-4o.

Known from the authors' scripts and README: the images' names, the lines of scores, the WiScore and its weights, where a
category begins. Assumed: that prompts are numbered from 1 to 1000 through all three files.

    exports/wise/{prompt_id}.png
    exports/wise/Results/*.jsonl    {prompt_id, Subcategory, consistency, realism, aesthetic_quality} a line; each score
                                    0 to 2, or 999 where GPT-4o gave none
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError
from symbiotic.evaluation.assets import asset
from symbiotic.evaluation.benchmark import MissingAsset, Record, Value, mean
from symbiotic.evaluation.composition import (
    Composition,
    Prompt,
    in_order,
    number_in,
    place,
    result_lines,
)
from symbiotic.evaluation.context import Gallery
from symbiotic.evaluation.ocrbench import read_json_list

KEY = "evaluation.benchmarks.wise"
PROMPTS_FROM = "its authors publish them as data/*.json in PKU-YuanGroup/WISE"
FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
WEIGHTS = {"cultural": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
TIME = ("Longitudinal time", "Horizontal time")


class WISE(Composition):
    """`wise/{category}`: the mean WiScore, (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, of each of six
    categories; `wise`: their weighted mean, where all six were judged.

    prompts: the folder of the three files (rewritten prompts beside them are not read); null: `wise/` of the assets.
    """

    name = "wise"
    images = 1

    def __init__(self, prompts: str | None = None) -> None:
        self.prompts = prompts

    def files(self) -> list[Path]:
        folder = asset(self.prompts, "wise", key=f"{KEY}.prompts", how=PROMPTS_FROM)
        found = [folder / name for name in FILES if (folder / name).is_file()]
        if not found:
            raise MissingAsset(f"{folder}: no {' or '.join(FILES)} in it; {PROMPTS_FROM}")
        return found

    def read(self) -> tuple[list[Prompt], list[str]]:
        prompts: dict[str, Prompt] = {}
        problems: list[str] = []
        for path in self.files():
            try:
                rows = read_json_list(path)
            except DataError as error:
                problems.append(str(error))
                continue
            for i, row in enumerate(rows):
                try:
                    prompt = read_prompt(row)
                    if prompt.id in prompts:
                        raise DataError(f"prompt_id {prompt.id} occurs twice")
                    prompts[prompt.id] = prompt
                except DataError as error:
                    problems.append(f"{path.name}: item {i}: {error}")
        return list(prompts.values()), problems

    def export(self, prompts: Sequence[Prompt], gallery: Gallery, folder: Path) -> None:
        for i, prompt in enumerate(prompts):
            place(gallery.path(i), folder / f"{prompt.id}.png")

    def result_files(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        results = folder / "Results"
        files = sorted(results.glob("*.jsonl"))
        if not files:
            command = "gpt_eval.py --image_dir $EXPORT --result_scores $EXPORT/Results/NAME.jsonl"
            raise self.not_yet("Results/*.jsonl", folder, f"WISE's {command}, once for each file of prompts,")
        return files

    def results(self, prompts: Sequence[Prompt], files: Sequence[Path]) -> list[Record]:
        known = {prompt.id: prompt for prompt in prompts}
        found = (judged(where, row, known) for path in files for where, row in result_lines(path))
        return in_order(files[0].parent, known, found)

    def scores(self, records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
        found: dict[str, list[float]] = {category: [] for category in WEIGHTS}
        for record in records:
            found[record["category"]].append(record["score"])
        if all(found.values()):
            whole = sum(weight * mean(found[category]).value for category, weight in WEIGHTS.items())
            yield self.name, Value(whole, len(records))
        yield from ((f"{self.name}/{category}", mean(scores)) for category, scores in found.items() if scores)


def read_prompt(row: Any) -> Prompt:
    """Raises DataError: not a prompt of WISE."""
    row = row if isinstance(row, dict) else {}
    number, text = row.get("prompt_id"), row.get("Prompt")
    if type(number) is not int or not 1 <= number <= 1000:
        raise DataError(f"prompt_id is {number!r}; must be a number from 1 to 1000")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"Prompt is {text!r}; must be a text")
    return Prompt(str(number), text, {"category": category_of(number, row.get("Subcategory"))})


def category_of(number: int, subcategory: Any) -> str:
    """By the number of the prompt; time and space by the subcategory."""
    if number <= 400:
        return "cultural"
    if number <= 700:
        return "time" if subcategory in TIME else "space"
    return ("biology", "physics", "chemistry")[(number - 701) // 100]


def judged(where: str, row: dict[str, Any], prompts: dict[str, Prompt]) -> tuple[str, str, Record]:
    """(where, prompt_id, record). Raises DataError: a score that GPT-4o did not give."""
    names = ("consistency", "realism", "aesthetic_quality")
    number = str(row.get("prompt_id"))
    if any(row.get(name) == 999 for name in names):
        raise DataError(f"{where}: prompt {number} was not judged (999); run the evaluator again")
    consistency, realism, aesthetic = (number_in(where, row, name, high=2) for name in names)
    score = (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic) / 2
    prompt = prompts.get(number)
    facts = {"prompt": prompt.text, "category": prompt.facts["category"]} if prompt else {}
    return where, number, {"id": number, **facts, **{name: row[name] for name in names}, "score": score}
