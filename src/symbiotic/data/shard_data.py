"""Shards of any origin as the corpus of a run: indexed once, what is bad in them left out and accounted for.

`<folder>/<fingerprint>/` holds `recipe.json`, `tokenizer.json`, `index.npz`, `data_account.json`, `bad_samples.jsonl`;
the shards stay where they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symbiotic.data.account import Account
from symbiotic.data.checks import Checks
from symbiotic.data.errors import readable_errors
from symbiotic.data.shards import ShardIndex
from symbiotic.data.tar import find_shards
from symbiotic.data.tokenizer import Tokenizer, words_of
from symbiotic.files import digest, locked, write_json, write_text
from symbiotic.schema import ConfigError


class ShardData:
    """
    Args:
        folder: parent of the corpus folder.
        shards: files, folders of .tar files, or patterns. The set of a shard is its name up to the number:
            `t2i-00017.tar` is of `t2i`.
        tokenizer: the words: a `tokenizer.json`, or the folder of a pretrained model that has one.
        row_tokens: of tokens a sample may have at most.
        max_bad: share of bad samples, and of unreadable bytes, that is borne.
        max_pixels: that an image may announce. decode: whether images are decoded while the index is made, or only
            when they are read, where one that is damaged ends the run.

    Raises:
        ConfigError: no shards, a file that is not there, or a number out of range.
    """

    def __init__(
        self,
        folder: str,
        shards: Sequence[str],
        tokenizer: str,
        row_tokens: int,
        max_bad: float = 0.01,
        max_pixels: int = 64_000_000,
        decode: bool = True,
    ) -> None:
        if not 0 <= max_bad <= 1:
            raise ConfigError(f"data.source.max_bad={max_bad:g}: must lie in [0, 1]")
        if max_pixels < 1:
            raise ConfigError(f"data.source.max_pixels={max_pixels}: must be at least 1")
        self.words = words_of(tokenizer, "data.source.tokenizer")
        given = [shards] if isinstance(shards, str) else shards
        self.shards = [str(Path(shard).absolute()) for shard in find_shards(given, "data.source.shards")]
        self.tokenizer = Path(tokenizer)
        self.row_tokens, self.max_bad, self.max_pixels, self.decode = row_tokens, max_bad, max_pixels, decode
        self.folder = Path(folder)
        found = ((shard, Path(shard).stat()) for shard in self.shards)
        stats = [(shard, stat.st_size, stat.st_mtime_ns) for shard, stat in found]
        recipe = {"version": 1, "shards": stats, "tokenizer": digest(self.words), "row_tokens": row_tokens}
        self.recipe: dict[str, Any] = recipe
        self.recipe |= {"max_bad": max_bad, "max_pixels": max_pixels, "decode": decode}
        self.fingerprint = digest(self.recipe)
        self.path = self.folder / self.fingerprint

    def prepare(self) -> Path:
        """Index the shards unless that was done; returns the corpus folder. Of several processes one does it.

        Raises:
            DataError: too much of them is bad; the line names the account, which is kept beside the corpus folder.
        """
        with readable_errors("write data", self.folder), locked(self.folder / f".{self.fingerprint}.lock"):
            if not (self.path / "recipe.json").is_file():
                self._write(self.folder / f"{self.fingerprint}.account")
        return self.path

    def _write(self, account_folder: Path) -> None:
        account_folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.of_text(self.words, self.tokenizer)
        checks = Checks(tokenizer, self.row_tokens, self.max_pixels, self.decode)
        account = Account(self.shards, self.max_bad, account_folder)
        index = ShardIndex.scan(Path("/"), self.shards, checks, account)
        shutil.rmtree(self.path, ignore_errors=True)  # without a recipe: half written
        account_folder.rename(self.path)
        write_text(self.path / "tokenizer.json", self.words)
        index.save(self.path / "index.npz")
        write_json(self.path / "recipe.json", self.recipe)
