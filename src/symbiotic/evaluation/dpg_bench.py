"""DPG-Bench (of ELLA, arXiv 2403.05135): long prompts, judged by a model that answers questions about the images.

Known from the authors' script: one square grid of 2 x 2 images a prompt, named as the prompt's file, cut into images of
`--resolution` pixels; and the text that it writes:

    exports/dpg_bench/partiprompts107.png
    exports/dpg_bench/results.txt      `{path}, {score}, …, {mean of the scores}` a prompt; then the categories' scores
                                       below `L1 category scores:`, and `DPG-Bench score: …`, both x 100
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.assets import asset
from symbiotic.evaluation.benchmark import MissingAsset, Record, Value, mean
from symbiotic.evaluation.composition import Composition, Prompt, in_order, read_text
from symbiotic.evaluation.context import Context, Gallery
from symbiotic.evaluation.images import image_facts, load_image, save_image

KEY = "evaluation.benchmarks.dpg_bench"
PROMPTS_FROM = "its authors publish them as dpg_bench/prompts/*.txt in TencentQQGYLab/ELLA"
CATEGORIES = re.compile(r"^L1 category scores:\n((?:\t.+\n)*)", re.MULTILINE)
TOTAL = re.compile(r"^DPG-Bench score: (.+)$", re.MULTILINE)


class DPGBench(Composition):
    """`dpg_bench`, 100 x the mean over prompts, and `dpg_bench/{category}` of its five first-level categories, as the
    evaluator wrote them (means over questions; n is that of the prompts).

    prompts: a folder of .txt files; null: `dpg_bench/prompts/` of the assets.
    """

    name = "dpg_bench"

    def __init__(self, prompts: str | None = None) -> None:
        self.prompts = prompts

    def files(self) -> list[Path]:
        folder = asset(self.prompts, "dpg_bench/prompts", key=f"{KEY}.prompts", how=PROMPTS_FROM)
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise MissingAsset(f"{folder}: no *.txt in it; {PROMPTS_FROM}")
        return files

    def read(self) -> tuple[list[Prompt], list[str]]:
        prompts, problems = [], []
        for path in self.files():
            try:
                prompts.append(read_prompt(path))
            except DataError as error:
                problems.append(str(error))
        return prompts, problems

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        if context.size[0] != context.size[1]:
            raise DataError(f"dpg_bench: images of {context.size[0]} x {context.size[1]}; its evaluator cuts squares")
        yield from super().run(model, context)

    def export(self, prompts: Sequence[Prompt], gallery: Gallery, folder: Path) -> None:
        for i, prompt in enumerate(prompts):
            path = folder / f"{prompt.id}.png"
            if path.is_file():
                continue
            four = gallery[self.images * i : self.images * (i + 1)]  # [4, S, S, 3]
            grid = np.concatenate([np.concatenate(list(row), axis=1) for row in (four[:2], four[2:])])
            with readable_errors("write", path):
                save_image(path, grid, image_facts(gallery.path(self.images * i)))

    def result_files(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        found = sorted(folder.glob("*results.txt"))
        if len(found) > 1:
            raise DataError(f"{folder}: {', '.join(p.name for p in found)}: which one? leave the one that counts")
        if not found:
            side = load_image(folder / f"{prompts[0].id}.png").shape[1] // 2
            command = f"compute_dpg_bench.py --image-root-path $EXPORT --resolution {side} --pic-num {self.images}"
            raise self.not_yet("results.txt", folder, f"DPG-Bench's {command} --res-path $EXPORT/results.txt")
        return found

    def results(self, prompts: Sequence[Prompt], files: Sequence[Path]) -> list[Record]:
        return read_results(files[0], [prompt.id for prompt in prompts])

    def scores(self, records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
        whole = mean([record["score"] for record in records])
        yield self.name, whole._replace(value=100 * whole.value)
        for category, score in records[0]["categories"].items():
            yield f"{self.name}/{category}", Value(score, whole.n)


def read_prompt(path: Path) -> Prompt:
    """Raises DataError: empty, not UTF-8, or of a name that the evaluator would cut."""
    text = read_text(path).strip()
    if not text:
        raise DataError(f"{path.name}: an empty prompt")
    if "." in path.stem:
        raise DataError(f"{path.name}: the evaluator reads names up to the first point; rename it")
    return Prompt(path.stem, text)


def read_results(path: Path, prompts: Sequence[str]) -> list[Record]:
    """One record a prompt: its score, those of its images, and of the first prompt, of all categories.

    Raises:
        DataError: not the evaluator's text, not of these prompts, or numbers that contradict each other.
    """
    text = read_text(path)
    total, categories = TOTAL.search(text), CATEGORIES.search(text)
    if total is None or categories is None:
        raise DataError(f"{path}: no line `DPG-Bench score:` behind the categories; was the evaluator interrupted?")
    lines = text[: categories.start()].split("\n")
    found = [image_line(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if ".png, " in line]
    records = in_order(path, prompts, found)
    score = 100 * float(np.mean([record["score"] for record in records]))
    said = as_number(f"{path}: DPG-Bench score", total[1])
    if not math.isclose(score, said, abs_tol=1e-6):
        raise DataError(f"{path}: says a score of {said:g}, its {len(records)} lines have the mean {score:g}")
    rows = [line.strip().rpartition(": ") for line in categories[1].splitlines()]
    records[0]["categories"] = {name: as_number(f"{path}: {name}", value) for name, _, value in rows}
    return records


def image_line(where: str, line: str) -> tuple[str, str, Record]:
    """(where, prompt, record) of `{path}, {score}, …, {mean}`; the path may hold commas."""
    name, _, numbers = line.rpartition(".png, ")
    *scores, average = (as_number(where, number) for number in numbers.split(", "))
    if not scores or not math.isclose(sum(scores) / len(scores), average, abs_tol=1e-9):
        raise DataError(f"{where}: {numbers!r}: must be scores and their mean")
    prompt = Path(name).name
    return where, prompt, {"id": prompt, "score": average, "images": scores}


def as_number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: {text!r} is no number") from None
