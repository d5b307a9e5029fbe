"""Data sets in the layouts that people have, as the corpus of a run: read once, written as shards of our own.

`<folder>/<fingerprint>/` holds what the embedded corpus holds (see `embedded`), without benchmarks, and the account of
every source. Images are written fitted, texts cut to rows; so disks hold what training reads, and nothing more.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from symbiotic.data.account import Account, joined, write_account
from symbiotic.data.adapters import Origin, pieces
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.packing import Array
from symbiotic.data.record_files import parquet_library, read_file
from symbiotic.data.shards import ShardIndex, write_shards
from symbiotic.data.tar import find_files, suffix_of, suffixes_of
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.files import digest, locked, write_json
from symbiotic.schema import ConfigError, parse

KEY = "data.source."


def parse_origins(sources: Mapping[str, Any]) -> dict[str, Origin]:
    """Name of a data set -> what it is made of.

    Raises:
        ConfigError: no sources, an unknown key, or an option without effect.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise ConfigError(f"{KEY}sources={sources}: must be a mapping, name of a data set -> its files and format")
    origins: dict[str, Origin] = {}
    for name, given in sources.items():
        key = f"{KEY}sources.{name}"
        if not name.replace("_", "").isalnum():
            raise ConfigError(f"{key}: the name of a data set must consist of letters, digits and _")
        spelt = (
            {**given, **{k: [given[k]] for k in ("files", "images") if isinstance(given.get(k), str)}} if given else {}
        )
        origins[name] = parse(Origin, spelt, key)
        origins[name].check(f"{key}.")
    return origins


def check_sizes(row_tokens: int, max_bad: float, max_pixels: int, tokenizer: str) -> None:
    """Raises ConfigError: a number out of range, or no tokenizer."""
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"{KEY}max_bad={max_bad:g}: must lie in [0, 1]")
    for name, value in (("max_pixels", max_pixels), ("row_tokens", row_tokens)):
        if value < 1:
            raise ConfigError(f"{KEY}{name}={value}: must be at least 1")
    if not Path(tokenizer).is_file():
        raise ConfigError(f"{KEY}tokenizer={tokenizer}: no such file")


def files_of(name: str, origin: Origin) -> list[str]:
    """The local files of a data set, sorted; those of a folder by what its format can be.

    Raises:
        ConfigError: there are none; a .parquet and no library for it.
    """
    found = find_files(origin.files, f"{KEY}sources.{name}.files", suffixes_of(origin.format))
    files = [str(Path(file).absolute()) for file in found]
    check_files(name, origin, files)
    return files


def check_files(name: str, origin: Origin, files: Sequence[str]) -> None:
    """Raises ConfigError: a file that cannot be of this format, or read; images that are not there."""
    key, suffixes = f"{KEY}sources.{name}", suffixes_of(origin.format)
    for file in files:
        if suffix_of(file) not in suffixes:
            raise ConfigError(f"{key}.files={file}: must be one of {', '.join(suffixes)} with format={origin.format}")
    if any(suffix_of(file) == ".parquet" for file in files):
        try:
            parquet_library()
        except DataError as error:
            raise ConfigError(f"{key}.files: {error}") from error
    if origin.images and not Path(origin.images[0]).is_dir():
        find_files(origin.images, f"{key}.images", (".tar",))


def good_samples(files: list[str], checks: Checks, account: Account) -> Iterator[ShardSample]:
    """Those of the files, in order; all others are counted. Raises DataError: more than the account bears."""
    for file in files:
        for event in read_file(file, checks):
            account.add(event)
            if isinstance(event.found, ShardSample):
                yield event.found


class SourceData:
    """
    Args:
        folder: parent of the corpus folder.
        sources: name of a data set -> its `adapters.Origin`, as a mapping. The mix gives weights to the names.
        tokenizer: the words, as `tokenizer.json`.
        row_tokens: of tokens a sample may have at most; longer texts are cut.
        max_bad: share of bad samples, and of unreadable bytes, that is borne in each source.
        max_pixels: that an image may announce. shard_size: samples in a shard.

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
        shard_size: int = 4000,
    ) -> None:
        check_sizes(row_tokens, max_bad, max_pixels, tokenizer)
        if shard_size < 1:
            raise ConfigError(f"{KEY}shard_size={shard_size}: must be at least 1")
        self.origins = parse_origins(sources)
        self.files = {name: files_of(name, origin) for name, origin in self.origins.items()}
        self.tokenizer, self.folder = Path(tokenizer), Path(folder)
        self.row_tokens, self.max_bad, self.max_pixels, self.shard_size = row_tokens, max_bad, max_pixels, shard_size
        self.recipe: dict[str, Any] = {"version": 1, "tokenizer": digest(self.tokenizer.read_text(encoding="utf-8"))}
        self.recipe |= {"row_tokens": row_tokens, "max_bad": max_bad, "max_pixels": max_pixels, "size": shard_size}
        for name, origin in self.origins.items():
            stats = [(file, (at := Path(file).stat()).st_size, at.st_mtime_ns) for file in self.files[name]]
            self.recipe[f"source {name}"] = [asdict(origin), stats]
        self.fingerprint = digest(self.recipe)
        self.path = self.folder / self.fingerprint

    def prepare(self) -> Path:
        """Write the corpus unless it is there; returns its folder. Of several processes one does it.

        Raises:
            DataError: too much of a source is bad (the line names the account, which is kept beside the corpus folder),
                or the disk is full.
        """
        with readable_errors("write data", self.folder), locked(self.folder / f".{self.fingerprint}.lock"):
            if not (self.path / "recipe.json").is_file():
                self._write(self.folder / f"{self.fingerprint}.account")
        return self.path

    def _write(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "shards").mkdir(parents=True)
        tokenizer = Tokenizer.load(self.tokenizer)
        accounts: dict[str, Account] = {}
        paths: list[Path] = []
        try:
            for name, files in self.files.items():
                accounts[name] = Account(files, self.max_bad)
                records = self._records(name, tokenizer, accounts[name])
                paths += write_shards(temporary / "shards", name, records, self.shard_size)
                accounts[name].finish()
        except DataError as error:
            shutil.rmtree(temporary / "shards")
            write_account(temporary, joined(accounts, self.max_bad), bad_of(accounts))
            raise DataError(f"{KEY}sources.{name}: {error}; see {temporary}") from error
        write_account(temporary, joined(accounts, self.max_bad), bad_of(accounts))
        shutil.copyfile(self.tokenizer, temporary / "tokenizer.json")
        ShardIndex.build(paths, tokenizer).save(temporary / "index.npz")
        write_json(temporary / "recipe.json", self.recipe)
        shutil.rmtree(self.path, ignore_errors=True)  # without a recipe: half written
        temporary.rename(self.path)

    def _records(
        self, name: str, tokenizer: Tokenizer, account: Account
    ) -> Iterator[tuple[Mapping[str, Any], Array | None]]:
        checks = Checks(tokenizer, self.row_tokens, self.max_pixels, origin=self.origins[name])
        for sample in good_samples(self.files[name], checks, account):
            record = {**sample.record, "from": f"{Path(sample.shard).name}: {sample.key}"}
            for piece in pieces(record, tokenizer.encode, self.row_tokens):
                yield piece, sample.pixels


def bad_of(accounts: Mapping[str, Account]) -> Iterator[dict[str, Any]]:
    """The bad samples of several sources, each with its source's name."""
    for name, account in accounts.items():
        for shard in account.shards.values():
            yield from ({"source": name, **asdict(bad)} for bad in shard.bad)
