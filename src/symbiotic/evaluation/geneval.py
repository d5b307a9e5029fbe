"""GenEval (arXiv 2310.11513): objects, counts, colours and positions, judged by a detector.

Known from the authors' scripts: the folders and names below, the lines of the results, the summary. Their README names
the samples 0000.png, their script 00000.png; their evaluator reads any name of digits.

    exports/geneval/00003/metadata.jsonl       line 3 (from 0) of evaluation_metadata.jsonl
    exports/geneval/00003/samples/0000.png     … 0003.png
    exports/geneval/results.jsonl              of the evaluator: {filename, tag, prompt, correct, reason, …} an image
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError
from symbiotic.evaluation.assets import asset, at_least
from symbiotic.evaluation.benchmark import Record, Value, mean
from symbiotic.evaluation.composition import (
    Composition,
    Prompt,
    in_order,
    json_lines,
    place,
    result_lines,
    write_whole,
)
from symbiotic.evaluation.context import Gallery

KEY = "evaluation.benchmarks.geneval"
PROMPTS_FROM = "its authors publish it as prompts/evaluation_metadata.jsonl in djghosh13/geneval"


class GenEval(Composition):
    """`geneval`, the mean over the tasks' shares of right images, and `geneval/{tag}`, each task's share.

    Args:
        prompts: evaluation_metadata.jsonl; null: `geneval/` of the assets. images: of each prompt; the authors' 4.
    """

    name = "geneval"

    def __init__(self, prompts: str | None = None, images: int = 4) -> None:
        at_least(KEY, 1, images=images)
        self.prompts, self.images = prompts, images

    def files(self) -> list[Path]:
        return [asset(self.prompts, "geneval/evaluation_metadata.jsonl", key=f"{KEY}.prompts", how=PROMPTS_FROM)]

    def read(self) -> tuple[list[Prompt], list[str]]:
        (path,) = self.files()
        prompts, problems = [], []
        for number, row in json_lines(path):
            texts = [row.get(key) for key in ("tag", "prompt")] if isinstance(row, dict) else []
            if texts and all(isinstance(text, str) and text.strip() for text in texts):
                prompts.append(Prompt(f"{number - 1:05d}", row["prompt"], row))
            else:
                problems.append(f"{path.name}: line {number}: must be a mapping with the texts tag and prompt")
        return prompts, problems

    def export(self, prompts: Sequence[Prompt], gallery: Gallery, folder: Path) -> None:
        for i, prompt in enumerate(prompts):
            write_whole(folder / prompt.id / "metadata.jsonl", json.dumps(prompt.facts))
            for j in range(self.images):
                place(gallery.path(i * self.images + j), folder / prompt.id / "samples" / f"{j:04d}.png")

    def result_files(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        path = folder / "results.jsonl"
        if not path.is_file():
            command = "evaluate_images.py $EXPORT --outfile $EXPORT/results.jsonl --model-path DETECTOR"
            raise self.not_yet(path.name, folder, f"GenEval's {command}")
        return [path]

    def results(self, prompts: Sequence[Prompt], files: Sequence[Path]) -> list[Record]:
        (path,) = files
        images = {f"{p.id}/samples/{j:04d}.png": p for p in prompts for j in range(self.images)}
        found = (judged(where, row, images) for where, row in result_lines(path))
        return in_order(path, images, found)

    def scores(self, records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
        tags: dict[str, list[float]] = {}
        for record in records:
            tags.setdefault(record["tag"], []).append(record["correct"])
        tasks = {tag: mean(right) for tag, right in tags.items()}
        yield self.name, mean([task.value for task in tasks.values()])._replace(n=len(records))
        yield from ((f"{self.name}/{tag}", task) for tag, task in tasks.items())


def judged(where: str, row: dict[str, Any], images: dict[str, Prompt]) -> tuple[str, str, Record]:
    """(where, image, record). Raises DataError: not a result of these prompts."""
    image = "/".join(Path(str(row.get("filename"))).parts[-3:])
    prompt, right = images.get(image), row.get("correct")
    for key in ("tag", "prompt"):
        if prompt is not None and row.get(key) != prompt.facts[key]:
            raise DataError(f"{where}: {image} has the {key} {row.get(key)!r}, in the prompts {prompt.facts[key]!r}")
    if right not in (True, False):
        raise DataError(f"{where}: correct is {right!r}; must be true or false")
    facts = {key: row.get(key) for key in ("tag", "prompt", "reason")}
    return where, image, {"id": image, **facts, "correct": bool(right)}
