"""OCRBench v1 (arXiv 2305.07895), run by lm-eval on any of its three layouts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from symbiotic.data.errors import DataError
from symbiotic.data.formats import reading_parts
from symbiotic.data.packing import build_sample
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.assets import asset, at_least, content_hash
from symbiotic.evaluation.benchmark import Benchmark, Record, Value, mean
from symbiotic.evaluation.caption_lists import files_hash
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.lm_eval_adapter import Answering, Document, run_task, task_facts
from symbiotic.evaluation.ocrbench import (
    GROUP_OF,
    OFFICIAL_COUNTS,
    Entry,
    correct,
    image_folder,
    ocrbench_files,
    read_ocrbench,
)
from symbiotic.evaluation.prompts import MAX_TOKENS

KEY = "evaluation.benchmarks.ocrbench"
OCRBENCH_FROM = (
    "the authors' OCRBench.json and images, the parquet file of echo840/OCRBench, or VLMEvalKit's OCRBench.tsv"
)
MAX_NEW_TOKENS = 100
PATCH = 4
"""Pixels a side of the patches that are read, see `data.packing`."""


class OCRBench(Benchmark):
    """`ocrbench`, the number of right answers of the official 1000, and `ocrbench/{group}`; of any other set of entries
    `ocrbench_share` and `ocrbench_share/{group}`, the share of right answers, which nobody takes for the count.

    Greedy decoding of 100 tokens behind the image and the bare question.

    Args:
        path: a file in one of the layouts of `read_ocrbench`, or a folder with one; null: `ocrbench/` of the assets.
        images: of OCRBench.json; null: OCRBench_Images/ beside it.
        resize: images that the model cannot take as they are become as large as it takes (see `fitted`); without, they
            are named and left out.
        max_tokens: of image, question and answer; longer entries are named and left out. null: no limit.
    """

    name = "ocrbench"

    def __init__(
        self,
        path: str | None = None,
        images: str | None = None,
        resize: bool = True,
        max_tokens: int | None = MAX_TOKENS,
    ) -> None:
        if max_tokens is not None:
            at_least(KEY, 1, max_tokens=max_tokens)
        self.path, self.images, self.resize, self.max_tokens = path, images, resize, max_tokens

    def found(self) -> Path:
        """Raises MissingAsset."""
        return asset(self.path, "ocrbench", key=f"{KEY}.path", how=OCRBENCH_FROM)

    def protocol(self) -> Mapping[str, Any]:
        files = ocrbench_files(self.found())
        images = Path(self.images) if self.images else image_folder(files[0], "OCRBench_Images")
        return {
            "files": files_hash(files),
            "images": content_hash(images) if files[0].suffix == ".json" else "in the file",
            "resize": self.resize,
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_tokens": self.max_tokens,
            "score": "OCRBench's rule",
            **task_facts("ocrbench"),
        }

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        entries, problems = read_ocrbench(self.found(), self.images)
        context.problems += problems
        read = functools.partial(readable, largest=largest_side(model), resize=self.resize)

        def check(entry: Entry) -> None:
            check_length(entry, read(entry), context.tokenizer, MAX_NEW_TOKENS, self.max_tokens)

        usable, _ = context.kept(context.chosen(entries), check)
        answering = Answering(
            model,
            context.tokenizer,
            functools.partial(context.measured, self.name),
            described,
            pixels=read,
            batch_size=context.batch_size,
        )
        run_task("ocrbench", [document(entry) for entry in usable], answering)
        yield from scores(answering.records)


def check_length(entry: Entry, pixels: np.ndarray, tokenizer: Tokenizer, answer: int, max_tokens: int | None) -> None:
    """Raises DataError: more tokens than `max_tokens`. answer: tokens that may be decoded."""
    sample = build_sample(entry.id, "mmu", reading_parts(pixels, entry.question, tokenizer))
    if max_tokens is not None and len(sample) + answer > max_tokens:
        what = f"{len(sample)} tokens of image and question, {answer} of the answer"
        raise DataError(f"{entry.where}: {what}; max_tokens={max_tokens}")


def document(entry: Entry) -> Document:
    return {
        "id": entry.id,
        "dataset_name": entry.dataset_name,
        "type": entry.type,
        "image": entry,
        "question": entry.question,
        "answers": list(entry.answers),
    }


def described(document: Document, prompt: str, prediction: str) -> Record:
    kept = {key: document[key] for key in ("id", "dataset_name", "type", "question", "answers")}
    return {**kept, "correct": correct(prediction, document["answers"], document["dataset_name"])}


def results(document: Document, predictions: Sequence[str]) -> dict[str, bool]:
    """The `process_results` of the task."""
    return {"correct": correct(predictions[0], document["answers"], document["dataset_name"])}


def scores(records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
    """All scores, from the records alone: counts of the official set, else shares."""
    groups: dict[str, list[bool]] = {group: [] for group in OFFICIAL_COUNTS}
    for record in records:
        groups.setdefault(GROUP_OF.get(record["type"], ""), []).append(record["correct"])
    official = {group: len(right) for group, right in groups.items()} == OFFICIAL_COUNTS
    name = "ocrbench" if official else "ocrbench_share"
    score = count if official else mean
    yield name, score([right for of_group in groups.values() for right in of_group])
    for group in OFFICIAL_COUNTS:
        if groups[group]:
            yield f"{name}/{group}", score(groups[group])


def count(right: Sequence[bool]) -> Value:
    return Value(float(sum(right)), len(right))


def largest_side(model: nn.Module) -> int | None:
    """Pixels of the largest image side that the model reads; None where it has no limit."""
    grid = getattr(getattr(model, "cfg", None), "max_grid", None)
    return None if grid is None else int(grid) * PATCH


def readable(entry: Entry, largest: int | None, resize: bool) -> np.ndarray:
    """uint8 [H, W, 3] of an entry's image, as the model takes it.

    Raises:
        DataError: an image that cannot be read, or that does not fit and is not to be resized.
    """
    pixels = entry.pixels()
    height, width, _ = pixels.shape
    size = fitted_size(height, width, largest)
    if size == (height, width):
        return pixels
    if not resize:
        limit = f", at most {largest}" if largest is not None else ""
        raise DataError(
            f"{entry.where}: {width}x{height} pixels; sides must be multiples of {PATCH}{limit}, or resize=true"
        )
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def fitted_size(height: int, width: int, largest: int | None) -> tuple[int, int]:
    """(height, width) with sides that are multiples of the patch: a longest side above `largest` becomes `largest`, and
    the aspect ratio stays as near as the patches allow. An image that fits is left as it is."""
    scale = 1.0 if largest is None else min(1.0, largest / max(height, width))
    return _side(height * scale), _side(width * scale)


def _side(pixels: float) -> int:
    return max(1, round(pixels / PATCH)) * PATCH
