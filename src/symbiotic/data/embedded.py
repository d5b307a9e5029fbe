"""The embedded corpus: knowledge, reading, generation. Written once, as shards and as benchmark files.

`<folder>/<fingerprint>/` holds

    recipe.json  tokenizer.json  index.npz
    shards/{set}-{number}.tar                            sets: t2i t2i_long lm lm_unreplayed mmu
    benchmarks/knowledge/{replayed,unreplayed}_{dev,test}.csv   MMLU's CSV: question,A,B,C,D,letter; no header
    benchmarks/reading/reading.json, images/             OCRBench's JSON
    benchmarks/generation/captions.jsonl, images/        captions with their attributes, and a reference picture each

The bytes depend on the recipe only. Training and benchmarks share no sets of choices on a fact, no scan, and no
held-out combination of attributes.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.formats import render_knowledge_prompt
from symbiotic.data.glyphs import (
    BACKGROUNDS,
    FOREGROUNDS,
    GENERATION_SIZE,
    LAYOUTS,
    READING_SIZE,
    Attributes,
    all_attributes,
    glyph,
    held_out_attributes,
    render_generation,
    render_reading,
    scans,
    split_scans,
)
from symbiotic.data.knowledge import SPLITS, World
from symbiotic.data.packing import Array
from symbiotic.data.shards import ShardIndex, encode_png, write_shards
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.schema import ConfigError

__all__ = ["Attributes", "EmbeddedData", "all_attributes", "render_generation", "render_knowledge_prompt"]

RECIPE_VERSION = 1
SETS = ("t2i", "t2i_long", "lm", "lm_unreplayed", "mmu")
READING_QUESTIONS = {
    "number": "what number is it ?",
    "foreground": "what color is the number ?",
    "background": "what color is the background ?",
}
_READING_CYCLE = ("number", "foreground", "number", "background")
_BYTES = {"lm": 1024, "lm_unreplayed": 1024, "mmu": 2304, "t2i": 2048, "t2i_long": 2048}  # in the tar, per sample
_FILE_BYTES = 4096  # a small file takes a block of the file system

Record = tuple[dict[str, Any], Array | None]


def free_bytes(folder: Path) -> int:
    """Free space for this user on the file system of `folder`."""
    return shutil.disk_usage(folder).free


class EmbeddedData:
    """The corpus of one recipe.

    Args:
        folder: parent of the corpus folder.
        seed: draws facts, renderings, splits and held-out combinations.
        lm, lm_unreplayed, mmu, t2i, t2i_long: training samples of each set.
        statements: share of plain sentences in the two sets of facts.
        lookups: share of questions in them that name a choice and ask for its letter, which teaches the format without
            any fact; the rest are four-choice questions on facts.
        questions: benchmark questions on each of the 192 facts.
        readings, captions: sizes of the other two benchmarks.
        shard_size: samples in a shard.

    Raises:
        ConfigError: a size below 1 or a share outside [0, 1].
    """

    def __init__(
        self,
        folder: str,
        seed: int = 0,
        lm: int = 8000,
        lm_unreplayed: int = 8000,
        mmu: int = 12000,
        t2i: int = 3000,
        t2i_long: int = 3000,
        statements: float = 0.1,
        lookups: float = 0.25,
        questions: int = 2,
        readings: int = 400,
        captions: int = 192,
        shard_size: int = 4000,
    ) -> None:
        self.sizes = {"t2i": t2i, "t2i_long": t2i_long, "lm": lm, "lm_unreplayed": lm_unreplayed, "mmu": mmu}
        others = {"questions": questions, "readings": readings, "captions": captions, "shard_size": shard_size}
        for name, value in {**self.sizes, **others}.items():
            if value < 1:
                raise ConfigError(f"data.source.{name}={value}: must be at least 1")
        for name, share in (("statements", statements), ("lookups", lookups)):
            if not 0 <= share <= 1 or statements + lookups > 1:
                raise ConfigError(f"data.source.{name}={share}: both shares must be at least 0 and add up to at most 1")
        self.folder = Path(folder)
        self.seed = seed
        self.recipe = {"version": RECIPE_VERSION, "seed": seed, **self.sizes, "statements": float(statements), **others}
        self.recipe["lookups"] = float(lookups)
        text = json.dumps(self.recipe, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = self.folder / self.fingerprint

    def is_ready(self) -> bool:
        """True when the corpus of this recipe is there; it appears in one rename, so never by halves."""
        return (self.path / "recipe.json").is_file()

    def needed_bytes(self) -> int:
        """Disk space that writing takes, rounded up."""
        shards = sum(count * _BYTES[name] for name, count in self.sizes.items())
        files = (int(self.recipe["readings"]) + int(self.recipe["captions"])) * _FILE_BYTES
        index = sum(self.sizes.values()) * 100
        return int(1.05 * (shards + files + index)) + 1_000_000

    def prepare(self, free: Callable[[Path], int] = free_bytes) -> Path:
        """Write the corpus unless it is there. Safe when several processes start together: one writes.

        Args:
            free: free bytes on the file system of a folder.

        Returns:
            The corpus folder.

        Raises:
            DataError: not enough space (before anything is written), a disk that fills up meanwhile, a missing
                permission; nothing is left behind.
        """
        with readable_errors("write data", self.folder):
            if self.is_ready():
                return self.path
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f".{self.fingerprint}.lock"):
                if not self.is_ready():
                    self._check_space(free(self.folder))
                    self._write_and_rename()
        return self.path

    def _check_space(self, have: int) -> None:
        need = self.needed_bytes()
        if have < need:
            raise DataError(
                f"not enough disk space for the data in {self.folder}: "
                f"need {need / 1e6:.0f} MB, have {have / 1e6:.0f} MB"
            )

    def _write_and_rename(self) -> None:
        if self.path.exists():
            raise DataError(f"{self.path}: not a complete data folder (no recipe.json); delete it")
        temporary = self.folder / f".{self.fingerprint}.tmp"  # under the lock: a leftover has no owner
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _Writer(self, temporary).write()
            temporary.rename(self.path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, released by the system when the process ends in any way."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Writer:
    """Writes all files of one corpus into a folder."""

    def __init__(self, data: EmbeddedData, folder: Path) -> None:
        self.data, self.folder, self.seed = data, folder, data.seed
        self.world = World(data.seed, test=int(data.recipe["questions"]))
        self.train_scans, self.test_scans = split_scans(data.seed)
        self.held_out = held_out_attributes(data.seed)
        self.seen = [a for a in all_attributes() if a not in self.held_out]

    def write(self) -> None:
        (self.folder / "shards").mkdir(parents=True)
        tokenizer = Tokenizer.build(self._words())
        tokenizer.save(self.folder / "tokenizer.json")
        self._write_knowledge(self.folder / "benchmarks" / "knowledge")
        self._write_reading(self.folder / "benchmarks" / "reading")
        self._write_captions(self.folder / "benchmarks" / "generation")
        paths = [path for name in SETS for path in self._write_set(name)]
        ShardIndex.build(paths, tokenizer).save(self.folder / "index.npz")
        (self.folder / "recipe.json").write_text(json.dumps(self.data.recipe, indent=2) + "\n")

    def _words(self) -> set[str]:
        example = next(iter(self.held_out))
        texts = [example.short_caption, example.long_caption, *READING_QUESTIONS.values(), *LAYOUTS]
        return self.world.words().union(FOREGROUNDS, BACKGROUNDS, *(text.split() for text in texts))

    def _write_set(self, name: str) -> list[Path]:
        count = self.data.sizes[name]
        size = int(self.data.recipe["shard_size"])
        statements, lookups = float(self.data.recipe["statements"]), float(self.data.recipe["lookups"])
        records: Iterator[Record]
        if name in ("lm", "lm_unreplayed"):
            facts = self.world.records(name == "lm", count, statements, lookups)
            records = ((record, None) for record in facts)
        elif name == "mmu":
            rng = np.random.default_rng([self.seed, 5])
            kinds = rng.integers(len(_READING_CYCLE), size=count)
            records = (self._reading(_READING_CYCLE[k], bool(rng.integers(2)), self.train_scans, rng) for k in kinds)
        else:
            records = self._generation(name, count)
        return write_shards(self.folder / "shards", name, records, size)

    def _reading(self, kind: str, handwritten: bool, numbers: dict[int, Array], rng: np.random.Generator) -> Record:
        """A picture of two digits with a question; `handwritten` uses the scans in `numbers`."""
        digits = [int(d) for d in rng.integers(10, size=2)]
        foreground = tuple(FOREGROUNDS)[int(rng.integers(len(FOREGROUNDS)))]
        background = tuple(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        used = [int(numbers[d][int(rng.integers(len(numbers[d])))]) for d in digits] if handwritten else []
        cells = [scans()[0][i] for i in used] or [glyph(d) for d in digits]
        answers = {"number": f"{digits[0]} {digits[1]}", "foreground": foreground, "background": background}
        record = {
            "task": "mmu",
            "question": READING_QUESTIONS[kind],
            "answer": answers[kind],
            "height": READING_SIZE[0],
            "width": READING_SIZE[1],
            "scans": used,
        }
        return record, render_reading(cells, foreground, background, rng)

    def _generation(self, name: str, count: int) -> Iterator[Record]:
        """Round after round over the combinations that are not held out."""
        rng = np.random.default_rng([self.seed, 6, SETS.index(name)])
        drawn = 0
        while drawn < count:
            for i in rng.permutation(len(self.seen))[: count - drawn]:
                drawn += 1
                yield self._picture(self.seen[int(i)], name == "t2i_long", rng)

    def _picture(self, attributes: Attributes, long: bool, rng: np.random.Generator) -> Record:
        record = {
            "task": "t2i_long" if long else "t2i",
            "caption": attributes.long_caption if long else attributes.short_caption,
            "height": GENERATION_SIZE[0],
            "width": GENERATION_SIZE[1],
            **attributes.record(),
        }
        return record, render_generation(attributes, rng)

    def _write_knowledge(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for split, replayed in SPLITS.items():
            for part, questions in (("dev", self.world.dev), ("test", self.world.test)):
                with (folder / f"{split}_{part}.csv").open("w", newline="") as stream:
                    rows = (q.row for q in questions if q.fact.replayed is replayed)
                    csv.writer(stream, lineterminator="\n").writerows(rows)

    def _write_reading(self, folder: Path) -> None:
        """Kinds of question take turns, and so do font and handwriting: any first part is a fair sample."""
        (folder / "images").mkdir(parents=True)
        rng = np.random.default_rng([self.seed, 7])
        items = []
        for number in range(int(self.data.recipe["readings"])):
            kind = _READING_CYCLE[number % 4]
            handwritten = number // 4 % 2 == 1
            record, pixels = self._reading(kind, handwritten, self.test_scans, rng)
            name = f"images/{number:05d}.png"
            (folder / name).write_bytes(encode_png(np.asarray(pixels)))
            items.append(
                {
                    "dataset_name": "embedded",
                    "id": number,
                    "image_path": name,
                    "question": record["question"],
                    "answers": [record["answer"]],
                    "type": f"{kind} {'handwritten' if handwritten else 'font'}",
                    "scans": record["scans"],
                }
            )
        (folder / "reading.json").write_text(json.dumps(items, indent=1) + "\n")

    def _write_captions(self, folder: Path) -> None:
        """Seen and held-out combinations take turns."""
        (folder / "images").mkdir(parents=True)
        rng = np.random.default_rng([self.seed, 8])
        groups = [rng.permutation(np.array(sorted(g, key=str), dtype=object)) for g in (self.seen, self.held_out)]
        with (folder / "captions.jsonl").open("w") as stream:
            for number in range(int(self.data.recipe["captions"])):
                group = groups[number % 2]
                attributes = group[number // 2 % len(group)]
                line = {"id": f"{number:05d}", "caption": attributes.short_caption, "held_out": number % 2 == 1}
                stream.write(json.dumps({**line, **attributes.record()}) + "\n")
                picture = encode_png(render_generation(attributes, rng))
                (folder / "images" / f"{number:05d}.png").write_bytes(picture)
