"""What `src/check_data.py` counts in one pass over shards, and the tables that it shows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from symbiotic.data.account import Account
from symbiotic.data.adapters import Origin
from symbiotic.data.bad import KINDS, BadSample
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.record_files import read_file
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.schema import TASKS, RunError
from symbiotic.studies.console import NONE, make_table, show

if TYPE_CHECKING:
    from symbiotic.studies.check_data import Request

MOST_ROWS = 20


@dataclass
class TaskCounts:
    """Of the good samples of a task; sizes of images in pixels."""

    samples: int = 0
    tokens: int = 0
    longest: int = 0
    targets: int = 0
    latents: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)

    def add(self, sample: ShardSample) -> None:
        self.samples += 1
        if sample.image.size:
            self.sizes[sample.record["height"], sample.record["width"]] += 1
        if sample.counts is not None:
            self.tokens += sample.counts.tokens
            self.longest = max(self.longest, sample.counts.tokens)
            self.targets += sample.counts.ce
            self.latents += sample.counts.latents


class Duplicates:
    """Keys that occur in several shards, and samples with the same record and image; 8 bytes and a bit for each."""

    def __init__(self) -> None:
        self._keys: dict[bytes, str] = {}
        self._contents: set[bytes] = set()
        self.keys = self.contents = 0
        self.example = ""

    def add(self, sample: ShardSample) -> None:
        first = self._keys.setdefault(_digest(sample.key), sample.shard)
        if first != sample.shard:
            self.keys += 1
            self.example = self.example or f"{sample.key} in {first} and {sample.shard}"
        content = _digest(repr((sample.record, sample.image.size, sample.image.crc)))
        self.contents += content in self._contents
        self._contents.add(content)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def check_shards(request: Request, shards: Sequence[str]) -> None:
    """Read all shards, print the tables, write the account where one is asked for.

    Raises:
        ConfigError: an option of the format that has no effect.
        RunError, DataError: there are bad samples, or none at all, in one line.
    """
    images = tuple(part.strip() for part in (request.images or "").split(",") if part.strip())
    same = {name: getattr(request, name) for name in ("format", "task", "text", "caption", "fit", "side")}
    origin = Origin(request.parts, images=images, **same)
    origin.check("")
    tokenizer = Tokenizer.load(request.tokenizer) if request.tokenizer else None
    checks = Checks(tokenizer, request.row_tokens, request.max_pixels, request.decode, origin)
    account = Account(shards, request.max_bad, Path(request.out) if request.out else None, at_least=None)
    tasks, duplicates = {task: TaskCounts() for task in TASKS}, Duplicates()
    for event in (event for shard in shards for event in read_file(shard, checks)):
        account.add(event)
        if isinstance(event.found, ShardSample):
            tasks[event.found.record["task"]].add(event.found)
            duplicates.add(event.found)
    show(shard_table(account), task_table(tasks, tokenizer is not None))
    show(*([kind_table(account)] if account.bad else []), duplicate_line(duplicates))
    account.finish()
    if account.bad:
        raise RunError(f"within max_bad={request.max_bad:g}: {account.summary()}")


def shard_table(account: Account) -> RenderableType:
    """A row a shard; of many, those with bad samples first."""
    shards = list(account.shards.items())
    if len(shards) > MOST_ROWS:
        shards = sorted(shards, key=lambda item: -len(item[1].bad))[:MOST_ROWS]
    rows = [[escape(n), f"{s.size / 1e6:,.1f}", f"{s.good:,}", f"{len(s.bad):,}", f"{s.unread:,}"] for n, s in shards]
    size, unread = (sum(getattr(s, key) for s in account.shards.values()) for key in ("size", "unread"))
    total = ["total", f"{size / 1e6:,.1f}", f"{account.good:,}", f"{account.bad:,}", f"{unread:,}"]
    left_out = len(account.shards) - len(rows)
    caption = f"{left_out} more shards with fewer bad samples, or none" if left_out else None
    return make_table("Shards", ["shard", "MB", "good", "bad", "bytes not read"], [*rows, total], caption)


def task_table(tasks: dict[str, TaskCounts], counted: bool) -> RenderableType:
    """counted: with tokens."""
    columns = ["task", "samples", "tokens", "mean", "longest", "targets", "latents", "images (height x width)"]
    rows = [[task, *_task_cells(counts)] for task, counts in tasks.items() if counts.samples]
    if not counted:
        columns, rows = [*columns[:2], columns[-1]], [[*row[:2], row[-1]] for row in rows]
    return make_table("Good samples by task", columns, rows, wrap=[len(columns) - 1])


def _task_cells(counts: TaskCounts) -> Iterator[str]:
    yield f"{counts.samples:,}"
    yield f"{counts.tokens:,}"
    yield f"{counts.tokens / counts.samples:.1f}"
    yield from (f"{value:,}" for value in (counts.longest, counts.targets, counts.latents))
    common = [f"{height} x {width}" for (height, width), _ in counts.sizes.most_common(3)]
    more = len(counts.sizes) - len(common)
    yield (", ".join(common) + (f" and {more} more" if more else "")) or NONE


def kind_table(account: Account) -> RenderableType:
    """Bad samples by kind, the meaning of each kind, and its first one."""
    first: dict[str, BadSample] = {}
    for shard in account.shards.values():
        for bad in shard.bad:
            first.setdefault(bad.kind, bad)
    rows = []
    for kind, count in account.kinds.items():
        bad = first[kind]
        where = ": ".join(filter(None, (bad.shard, bad.key)))
        rows.append([kind, f"{count:,}", KINDS[kind], escape(f"{where}\n{bad.reason}")])
    return make_table("Bad samples by kind", ["kind", "bad", "meaning", "the first one"], rows, words=[2, 3])


def duplicate_line(duplicates: Duplicates) -> str:
    example = f" (such as {escape(duplicates.example)})" if duplicates.example else ""
    return (
        f"Duplicates: {duplicates.keys:,} samples have a key that another shard has, too{example}; "
        f"{duplicates.contents:,} have the content of an earlier one."
    )
