"""What a benchmark gets beside the model, and where the traces of an evaluation go.

With a folder, records and images are written as they are made, in pieces of `batch_size` items; what a kill cut off is
made again, what was finished is not, and nothing is counted twice:

    {benchmark}.jsonl          one record a line, in the order of the items
    images/{set}/{i:05d}.png   generated images
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Record, batches, write_jsonl
from symbiotic.evaluation.images import load_image, save_image
from symbiotic.evaluation.prompts import MAX_TOKENS, pictures
from symbiotic.schema import Objective

T = TypeVar("T")
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Context:
    """
    Args:
        tokenizer, objective, size: of the run: its words, its sampler, the (height, width) of the images it draws.
        seed: draws the noise that images start from; nothing else is left to chance.
        share: of each benchmark's items that are measured, see `chosen`; 1 but for quick looks while training.
        folder: where records and images are kept; None: in memory.
        caption_tokens: of a caption that an image is drawn from, at most.
        files: names in it that were made here: ledgers, and folders of images.
    """

    tokenizer: Tokenizer
    objective: Objective
    size: tuple[int, int] = (20, 20)
    seed: int = 0
    batch_size: int = 96
    share: float = 1.0
    folder: Path | None = None
    caption_tokens: int = MAX_TOKENS
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def chosen(self, items: Sequence[T], limit: int | None = None) -> Sequence[T]:
        """The items to measure: the first `limit`, and of these `share`, at least one.

        They lie evenly in the file, which may be sorted by subject or take turns (every other item would then be of one
        kind): the multiples of the golden ratio spread evenly, and in step with no period.
        """
        among = items[:limit]
        if self.share == 1:
            return among
        places = sorted(range(len(among)), key=lambda i: i * GOLDEN % 1)
        return [among[i] for i in sorted(places[: math.ceil(len(among) * self.share)])]

    def kept(self, items: Sequence[T], prepare: Callable[[T], Any]) -> tuple[list[T], list[Any]]:
        """The items that can be prepared, and what they became; the others are named in `problems`."""
        usable, prepared = [], []
        for item in items:
            try:
                prepared.append(prepare(item))
            except DataError as error:
                self.problems.append(str(error))
            else:
                usable.append(item)
        return usable, prepared

    def check_caption(self, where: str, caption: str) -> None:
        """Raises DataError: a caption that is too long to draw from."""
        tokens = len(self.tokenizer.encode(caption))
        if tokens > self.caption_tokens:
            raise DataError(f"{where}: a caption of {tokens} tokens; evaluation.caption_tokens={self.caption_tokens}")

    def measured(
        self, benchmark: str, items: Sequence[T], measure: Callable[[Sequence[T]], Sequence[Record]]
    ) -> list[Record]:
        """One record per item, in their order; `measure` gets at most `batch_size` items that have none yet.

        The records go to `{benchmark}.jsonl` and to `records`, each with the key `benchmark`.
        """
        self.files.append(f"{benchmark}.jsonl")
        ledger = Ledger(self.folder / f"{benchmark}.jsonl" if self.folder else None, len(items), self.batch_size)
        for some in batches(items[len(ledger.records) :], self.batch_size):
            ledger.add([{"benchmark": benchmark, **record} for record in measure(some)])
        self.records += ledger.records
        return ledger.records

    def gallery(
        self,
        model: nn.Module,
        name: str,
        captions: Sequence[str],
        numbers: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Gallery:
        """One generated image per caption; those that lie in the folder are not made again.

        Args:
            name: of the set of captions; benchmarks that name the same set with the same captions share its images.
            numbers: what each image's noise is drawn from, with `seed`; default 0, 1, 2, ...
            size: (height, width) in pixels; default that of the run.
        """
        self.files.append(f"images/{name}")
        folder = self.folder / "images" / name if self.folder else None
        gallery = Gallery(list(captions), folder)
        numbered = list(enumerate(range(len(captions)) if numbers is None else numbers))
        for some in batches(numbered, self.batch_size):
            if all(gallery.has(i) for i, _ in some):
                continue
            made = pictures(
                model,
                [captions[i] for i, _ in some],
                self.tokenizer,
                self.objective,
                size=size or self.size,
                seed=self.seed,
                numbers=[number for _, number in some],
                batch_size=self.batch_size,
            ).numpy()
            for (i, number), pixels in zip(some, made, strict=True):
                gallery.put(i, pixels, self.facts(captions[i], number))
        return gallery

    def facts(self, caption: str, number: int) -> dict[str, str]:
        """What an image was made from."""
        return {
            "prompt": caption,
            "seed": f"{self.seed}/{number}",
            "guidance": f"{self.objective.sampler.guidance:g}",
            "sampler": sampler_text(self.objective),
        }


def sampler_text(objective: Objective) -> str:
    """How images are sampled, guidance aside."""
    sampler = objective.sampler
    if objective.name == "autoregressive":
        among = f"top-k {sampler.top_k or 'off'}, top-p {sampler.top_p:g}"
        return f"code by code, temperature {sampler.temperature:g}, {among}"
    return f"euler, {sampler.steps} steps, time shift {sampler.time_shift:g}"


class Ledger:
    """The records of one benchmark, in a file that grows piece by piece."""

    def __init__(self, path: Path | None, items: int, piece: int) -> None:
        """items: how many there will be. A piece that is not whole is cut off, and will be measured again."""
        self.path = path
        self.records: list[Record] = []
        if path is not None and path.is_file():
            self.records = list(whole_lines(path))[:items]
            if len(self.records) < items:
                del self.records[len(self.records) // piece * piece :]
            with readable_errors("write", path):
                write_jsonl(path, self.records)

    def add(self, records: Sequence[Record]) -> None:
        self.records += [json.loads(line(record)) for record in records]  # as they will be read again
        if self.path is None:
            return
        with readable_errors("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(line, records)))
                file.flush()
                os.fsync(file.fileno())


def line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def whole_lines(path: Path) -> Iterator[Record]:
    """The records of a JSONL file up to the first line that is none."""
    with readable_errors("read", path):
        text = path.read_bytes().decode("utf-8", errors="replace")
    for row in text.split("\n"):  # not splitlines: U+2028 may stand inside a text
        try:
            record = json.loads(row)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        yield record


class Gallery(Sequence[np.ndarray]):
    """Generated images, uint8 [H, W, 3] each, in the order of their captions; in a folder or in memory."""

    def __init__(self, captions: list[str], folder: Path | None = None) -> None:
        self.captions, self.folder = captions, folder
        self._held: dict[int, np.ndarray] = {}

    def path(self, i: int) -> Path:
        """Where image i lies; only of a gallery with a folder."""
        assert self.folder is not None
        return self.folder / f"{i:05d}.png"

    def has(self, i: int) -> bool:
        return i in self._held if self.folder is None else self.path(i).is_file()

    def put(self, i: int, pixels: np.ndarray, facts: dict[str, str]) -> None:
        if self.folder is None:
            self._held[i] = pixels
        else:
            with readable_errors("write images", self.folder):
                save_image(self.path(i), pixels, facts)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: Any) -> Any:
        """uint8 [H, W, 3]; of a slice, uint8 [n, H, W, 3].

        Raises:
            DataError: an image in the folder that cannot be read.
        """
        if isinstance(i, slice):
            return np.stack([self[j] for j in range(*i.indices(len(self)))])
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return self._held[i] if self.folder is None else load_image(self.path(i))
