"""What the benchmarks of composition share: their evaluators (detectors, question answering, GPT-4o) live in frozen
environments of their own, so here images are made and laid out as those evaluators read them, and what they wrote is
read back.

    images/{benchmark}/*.png    of this evaluation, with what they were made from
    exports/{benchmark}/        the official layout; the images are the same files (hard links)

An evaluator writes its results into the export, where each benchmark looks for them: the results of one run cannot be
taken for those of another. Until they are there, the benchmark is missing a file, and the line says which evaluator to
run on what; when they are there, evaluating again imports them. They are imported once: to read changed results,
remove `parts/{benchmark}.json` and `{benchmark}.jsonl` of the evaluation.
"""

from __future__ import annotations

import abc
import functools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.benchmark import Benchmark, MissingAsset, Record, Value
from symbiotic.evaluation.caption_lists import files_hash
from symbiotic.evaluation.context import Context, Gallery
from symbiotic.evaluation.tables import parse_json

MAX_NAME = 255
"""Bytes of a file name."""


@dataclass(frozen=True)
class Prompt:
    """id: names it in records and files. facts: what else the official file says of it."""

    id: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Composition(Benchmark):
    """images: of each prompt; image j of prompt i is number i * images + j of the set, and of the noise."""

    needs_latents = True
    images: int = 4

    @abc.abstractmethod
    def files(self) -> list[Path]:
        """The official files of prompts. Raises MissingAsset."""

    @abc.abstractmethod
    def read(self) -> tuple[list[Prompt], list[str]]:
        """The prompts, and one line for each that cannot be used. Raises MissingAsset, DataError."""

    @abc.abstractmethod
    def export(self, prompts: Sequence[Prompt], gallery: Gallery, folder: Path) -> None:
        """Write the official layout; what is there already is left or becomes the same bytes."""

    @abc.abstractmethod
    def result_files(self, prompts: Sequence[Prompt], folder: Path) -> list[Path]:
        """What the official evaluator wrote into the export. Raises MissingAsset: it has not run yet (`not_yet`)."""

    @abc.abstractmethod
    def results(self, prompts: Sequence[Prompt], files: Sequence[Path]) -> list[Record]:
        """One record per image or prompt, in their order.

        Raises:
            DataError: the results are not those of this export, or not of all of it.
        """

    @abc.abstractmethod
    def scores(self, records: Sequence[Record]) -> Iterator[tuple[str, Value]]:
        """As the official summary computes them, from the records alone."""

    def protocol(self) -> Mapping[str, Any]:
        return {"prompts": files_hash(self.files()), "images": self.images, "image_size": "of the run"}

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        if context.folder is None:
            raise MissingAsset(f"{self.name}: its images go to the folder of an evaluation; src/eval.py has one")
        prompts, problems = self.read()
        context.problems += problems
        prompts, _ = context.kept(context.chosen(prompts), functools.partial(check_prompt, context))
        if not prompts:
            raise DataError("; ".join([f"{self.files()[0]}: no prompt in it", *context.problems[:1]]))
        gallery = context.gallery(model, self.name, [p.text for p in prompts for _ in range(self.images)])
        folder = context.folder / "exports" / self.name
        self.export(prompts, gallery, folder)
        try:
            files = self.result_files(prompts, folder)
        except MissingAsset as error:
            problems = context.problems
            left_out = f"; {len(problems)} prompts were left out: {problems[0]}" if problems else ""
            raise MissingAsset(f"{error}{left_out}") from error
        context.files += [str(path.relative_to(context.folder)) for path in files]
        yield from self.scores(context.measured(self.name, self.results(prompts, files), list))

    def not_yet(self, results: str, folder: Path, how: str) -> MissingAsset:
        """The line about an export that waits for its evaluator. results: in the folder. how: a command on $EXPORT."""
        return MissingAsset(
            f"no {results} in EXPORT={folder}, where the images lie: {how} writes it; then evaluate again"
        )


def check_prompt(context: Context, prompt: Prompt) -> None:
    """Raises DataError: half of a character, which no image could carry in its text chunks; too long."""
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"prompt {prompt.id}: {prompt.text!r}: not valid Unicode") from error
    context.check_caption(f"prompt {prompt.id}", prompt.text)


# --------------------------------------------------------------------------- files


def place(source: Path, target: Path) -> None:
    """The file at another place too: a hard link, or a copy where the file system has none."""
    with readable_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.samefile(source):
            return
        part = target.parent / f".{os.getpid()}.part"
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        part.replace(target)


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    with readable_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f".{os.getpid()}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def read_text(path: Path) -> str:
    """Raises DataError: not readable, or not UTF-8."""
    with readable_errors("read", path):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, content) of each line that is not empty; the content of one that is no JSON is the error."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, error


def result_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL file of results. Raises DataError: a line that is no mapping."""
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            why = f"not JSON: {row}" if isinstance(row, ValueError) else "must be a mapping"
            raise DataError(f"{path}:{number}: {why}; was the evaluator interrupted?")
        yield f"{path}:{number}", row


# --------------------------------------------------------------------------- results


def in_order(path: Path, expected: Iterable[str], found: Iterable[tuple[str, str, Record]]) -> list[Record]:
    """The records of all expected images, in that order.

    Args:
        path: of the results, for messages. found: (where, image, record).

    Raises:
        DataError: an image that was not exported, one that is judged twice, or images without a result.
    """
    records: dict[str, Record | None] = dict.fromkeys(expected)
    for where, image, record in found:
        if image not in records:
            raise DataError(f"{where}: {image} is not in this export")
        if records[image] is not None:
            raise DataError(f"{where}: {image} has two results")
        records[image] = record
    lacking = [image for image, record in records.items() if record is None]
    if lacking:
        count = f"{len(lacking)} of {len(records)}"
        raise DataError(f"{path}: no result for {count} images, the first is {lacking[0]}; run the evaluator again")
    return [record for record in records.values() if record is not None]


def number_in(where: str, row: Mapping[str, Any], key: str, high: float = 1.0, low: float = 0.0) -> float:
    """A number, possibly as text. Raises DataError: none, or out of range."""
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        raise DataError(f"{where}: {key} is {row.get(key)!r}; must be a number from {low:g} to {high:g}")
    return value
