"""Streams as the source of a run: files on disks or in stores, read from first to last while it trains.

Nothing is read in advance but the beginning of every source, which is written as a small corpus of our own: checks, the
probe, the profile and images to look at are taken from it. `<folder>/<fingerprint>/` holds what `sources` writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from symbiotic.data.account import write_account
from symbiotic.data.adapters import Origin
from symbiotic.data.checks import Checks
from symbiotic.data.cursor import Cursor, account_of
from symbiotic.data.encoded import Made
from symbiotic.data.errors import readable_errors
from symbiotic.data.packing import Array
from symbiotic.data.remote import Fetching, Opener, addresses, is_remote
from symbiotic.data.shards import ShardIndex, write_shards
from symbiotic.data.sources import KEY, check_files, check_sizes, files_of, parse_origins
from symbiotic.data.stream_plan import StreamPlan
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.files import digest, locked, write_json
from symbiotic.schema import ConfigError, Data, Mix, Objective


class StreamData:
    """
    Args:
        folder, sources, tokenizer, row_tokens, max_bad, max_pixels: as those of `sources.SourceData`.
        decode: whether images are decoded as they are read, which finds the damaged ones and takes the time of it in
            every process; without it one that is damaged ends the run.
        window: samples of a source that are shuffled together; they are in memory.
        head: samples of each source in the corpus that is written.
        cache, cache_gb, retries, wait, timeout: how files in stores are read, see `remote.Fetching`.

    Raises:
        ConfigError: a source that is none, a file that is not there, or a number out of range.
    """

    def __init__(
        self,
        folder: str,
        sources: dict[str, Any],
        tokenizer: str,
        row_tokens: int,
        max_bad: float = 0.01,
        max_pixels: int = 64_000_000,
        decode: bool = True,
        window: int = 256,
        head: int = 256,
        cache: str = "cache",
        cache_gb: float = 50.0,
        retries: int = 8,
        wait: float = 0.5,
        timeout: float = 60.0,
    ) -> None:
        check_sizes(row_tokens, max_bad, max_pixels, tokenizer)
        for name, value in (("window", window), ("head", head)):
            if value < 1:
                raise ConfigError(f"{KEY}{name}={value}: must be at least 1")
        self.origins = parse_origins(sources)
        fetching = Fetching(cache, cache_gb, retries, wait, timeout)
        fetching.check(KEY)
        found = {name: stream_files(name, origin) for name, origin in self.origins.items()}
        self.files = {name: files for name, (files, _) in found.items()}
        self.open = Opener({shown: at for _, remote in found.values() for shown, at in remote.items()}, fetching)
        self.tokenizer, self.folder = Path(tokenizer), Path(folder)
        self.row_tokens, self.max_bad, self.max_pixels, self.decode = row_tokens, max_bad, max_pixels, decode
        self.window, self.head = window, head
        words = digest(self.tokenizer.read_text(encoding="utf-8"))
        self.recipe: dict[str, Any] = {"version": 1, "stream": True, "tokenizer": words, "row_tokens": row_tokens}
        self.recipe |= {"max_pixels": max_pixels, "decode": decode, "window": window, "head": head}
        for name, origin in self.origins.items():
            options = {key: value for key, value in asdict(origin).items() if key != "files"}
            self.recipe[f"source {name}"] = [options, [_stat(file) for file in self.files[name]]]
        self.fingerprint = digest(self.recipe)
        self.path = self.folder / self.fingerprint

    def cursors(
        self, tokenizer: Tokenizer, seed: int, made: Made | None = None, row_tokens: int = 1 << 62
    ) -> dict[str, Cursor]:
        """The streams from their beginning, in an order that the seed draws. made: in the place of read pixels; with
        it samples must fit in rows of `row_tokens`."""
        extra = partial(made.extra, tokenizer) if made is not None else None
        return {
            name: Cursor(
                name,
                self.files[name],
                self._checks(tokenizer, origin),
                seed,
                self.window,
                self.max_bad,
                self.open,
                extra,
                row_tokens,
            )
            for name, origin in self.origins.items()
        }

    def _checks(self, tokenizer: Tokenizer, origin: Origin) -> Checks:
        return Checks(tokenizer, self.row_tokens, self.max_pixels, self.decode, origin, keep=True)

    def plan(
        self,
        head: ShardIndex,
        mix: Mix,
        data: Data,
        seed: int,
        objective: Objective | None,
        schedule: Sequence[tuple[int, Mapping[str, float]]] = (),
        made: Made | None = None,
    ) -> StreamPlan:
        """The plan of a training. head: the index of the corpus. made: what read images become. Others, and errors, as
        those of `DataPlan`."""
        cursors = self.cursors(Tokenizer.load(self.tokenizer), seed, made, data.row_tokens)
        return StreamPlan(cursors, self.origins, head, mix, data, seed, objective, schedule)

    def prepare(self) -> Path:
        """Write the beginning of every source as a corpus, unless it is there; returns its folder.

        Raises:
            DataError: a source whose beginning is bad, or a full disk.
        """
        with readable_errors("write data", self.folder), locked(self.folder / f".{self.fingerprint}.lock"):
            if not (self.path / "recipe.json").is_file():
                self._write(self.folder / f".{self.fingerprint}.tmp")
        return self.path

    def _write(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "shards").mkdir(parents=True)
        tokenizer = Tokenizer.load(self.tokenizer)
        cursors = self.cursors(tokenizer, seed=0)
        paths: list[Path] = []
        for name, cursor in cursors.items():
            paths += write_shards(temporary / "shards", name, self._head(cursor, self.origins[name]), self.head)
        states = {name: cursor.state() for name, cursor in cursors.items()}
        bad = chain.from_iterable(({"source": name, **bad} for bad in s["examples"]) for name, s in states.items())
        write_account(temporary, account_of(states, self.max_bad), bad)
        shutil.copyfile(self.tokenizer, temporary / "tokenizer.json")
        ShardIndex.build(paths, tokenizer).save(temporary / "index.npz")
        write_json(temporary / "recipe.json", self.recipe)
        shutil.rmtree(self.path, ignore_errors=True)
        temporary.rename(self.path)

    def _head(self, cursor: Cursor, origin: Origin) -> Iterator[tuple[Mapping[str, Any], Array | None]]:
        for _ in range(self.head):
            item = cursor.take()
            if cursor.begun_again:
                return
            yield {**item.record, "from": f"{item.shard.rpartition('/')[2]}: {item.key}"}, item.pixels(origin)


def stream_files(name: str, origin: Origin) -> tuple[list[str], dict[str, str]]:
    """The files of a source by name, and the addresses of those that lie in stores. Raises ConfigError."""
    key = f"{KEY}sources.{name}.files"
    remote = {n: at for part in origin.files if is_remote(part) for n, at in addresses(part, key).items()}
    paths = tuple(part for part in origin.files if not is_remote(part))
    local = files_of(name, replace(origin, files=paths)) if paths or not remote else []
    check_files(name, origin, list(remote))
    return [*local, *remote], remote


def _stat(file: str) -> list[Any]:
    """Of a file in a store its name alone: it is held against its cache when it is opened."""
    if is_remote(file):
        return [file]
    at = Path(file).stat()
    return [file, at.st_size, at.st_mtime_ns]
