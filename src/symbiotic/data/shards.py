"""Webdataset shards with an index: offset, size and CRC-32 of every member, so that any sample is one read away.

A shard is a plain tar `{set}-{number:05d}.tar` with the members `KEY.json` and, for tasks with an image, `KEY.png`.
Shards of our own are indexed strictly (`ShardIndex.build`); those of others sample by sample, bad ones left out with an
account (`ShardIndex.scan`), and their images may be JPEG or WebP. Either way every read is checked against the index.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from symbiotic.data.account import Account, set_name
from symbiotic.data.bad import Refused
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.formats import image_size, measure
from symbiotic.data.image_files import MAX_PIXELS, decode_image, read_header
from symbiotic.data.packing import Array
from symbiotic.data.scan import read_shard
from symbiotic.data.tar import LocalSource, check_local, open_plain
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.schema import TASKS

__all__ = ["DataError", "ShardIndex", "ShardReader", "encode_png", "write_shards"]

REWRITE = "delete the data folder and start again to have it written anew"
REINDEX = "the shard is not the one that was indexed; make the index anew"
_BLOCK = 512
_MEMBERS = ("json", "png")


def encode_png(pixels: Array) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a PNG, always the same ones."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=6, compress_type=3)
    return buffer.getvalue()


def write_shards(
    folder: Path, name: str, records: Iterable[tuple[Mapping[str, Any], Array | None]], shard_size: int
) -> list[Path]:
    """Write one data set as shards of `shard_size` samples; the bytes depend on nothing but the records.

    Raises:
        OSError: whatever the system refuses; the caller removes the folder.
    """
    import webdataset

    paths: list[Path] = []
    numbered = enumerate(records)
    first = next(numbered, None)
    while first is not None:
        paths.append(folder / f"{name}-{len(paths):05d}.tar")
        with paths[-1].open("wb") as stream, webdataset.TarWriter(stream, mtime=0, encoder=False) as tar:
            left = shard_size
            while first is not None and left:
                tar.write(_members(f"{name}-{first[0]:06d}", *first[1]))
                first, left = next(numbered, None), left - 1
    return paths


def _members(key: str, record: Mapping[str, Any], pixels: Array | None) -> dict[str, Any]:
    members = {"__key__": key, "json": json.dumps(record, separators=(",", ":")).encode()}
    return members if pixels is None else {**members, "png": encode_png(pixels)}


@dataclass(frozen=True)
class ShardIndex:
    """Where every sample lies and how long it is; n samples, sorted by set and then by shard.

    A size of 0 in `png` means that the sample has no image; of scanned shards it may be a JPEG or WebP.
    """

    sets: Array  # [sets] str
    shards: Array  # [shards] str: file names
    shard_bytes: Array  # [shards] int64
    keys: Array  # [n] bytes
    set: Array  # [n] int16: index in sets
    shard: Array  # [n] int32: index in shards
    task: Array  # [n] int8: index in schema.TASKS
    json: Array  # [n, 3] int64: offset, size, CRC-32
    png: Array  # [n, 3] int64
    num_tokens: Array  # [n] int32
    num_ce: Array  # [n] int32: next-token targets
    num_latents: Array  # [n] int32
    dropped_tokens: Array  # [n] int32: tokens with the caption dropped
    dropped_ce: Array  # [n] int32

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, sample: int) -> str:
        """`shard: key`, for messages."""
        return f"{self.shards[self.shard[sample]]}: {self.keys[sample].decode()}"

    def members_of(self, name: str) -> Array:
        """Sample numbers of a data set; empty where there is no such set."""
        return np.flatnonzero(self.set == list(self.sets).index(name)) if name in self.sets else np.arange(0)

    @classmethod
    def build(cls, paths: Sequence[Path], tokenizer: Tokenizer) -> ShardIndex:
        """Scan the tars.

        Raises:
            DataError: a shard that is not a whole tar, or a member that is not ours; the line names it.
        """
        paths = sorted(paths)
        shards = [(path.name, path.name.rsplit("-", 1)[0], path.stat().st_size) for path in paths]
        return cls._of(shards, ((i, *row) for i, path in enumerate(paths) for row in _scan(path, tokenizer)))

    @classmethod
    def scan(cls, folder: Path, shards: Sequence[str], checks: Checks, account: Account) -> ShardIndex:
        """Index shards that may hold anything: their good samples, in order. Bad ones are in the account.

        Args:
            shards: file names below `folder`, all of them known to the account.
            checks: with a tokenizer, for the lengths. `decode`: whether images are decoded now, or when first read.

        Raises:
            DataError: more bad samples than the account bears, no good one, or a name that is a command.
        """
        if checks.tokenizer is None:
            raise ValueError("an index holds lengths, and needs a tokenizer for them")
        rows = []
        for number, shard in enumerate(shards):
            for event in read_shard(check_local(shard), checks, open_source=lambda name: LocalSource(folder / name)):
                account.add(event)
                if isinstance(event.found, ShardSample):
                    rows.append((number, *_row(event.found)))
        account.finish()
        return cls._of([(shard, set_name(shard), account.shards[shard].size) for shard in shards], rows)

    @classmethod
    def _of(cls, shards: Sequence[tuple[str, str, int]], rows: Iterable[tuple[Any, ...]]) -> ShardIndex:
        """shards: file name, set, bytes. rows: number of the shard, key, task, json place, png place, counts."""
        names = sorted({name for _, name, _ in shards})
        set_of = np.array([names.index(name) for _, name, _ in shards], dtype=np.int16)
        columns = list(zip(*rows, strict=True)) or [()] * 6
        numbers, keys, tasks, jsons, pngs, counts = columns
        shard = np.array(numbers, dtype=np.int32)
        count = np.array(counts, dtype=np.int32).reshape(-1, 5)
        return cls(
            sets=np.array(names),
            shards=np.array([file for file, _, _ in shards]),
            shard_bytes=np.array([size for _, _, size in shards], dtype=np.int64),
            keys=np.array([key.encode() for key in keys]),
            set=set_of[shard],
            shard=shard,
            task=np.array(tasks, dtype=np.int8),
            json=np.array(jsons, dtype=np.int64).reshape(-1, 3),
            png=np.array(pngs, dtype=np.int64).reshape(-1, 3),
            num_tokens=count[:, 0],
            num_ce=count[:, 1],
            num_latents=count[:, 2],
            dropped_tokens=count[:, 3],
            dropped_ce=count[:, 4],
        )

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> ShardIndex:
        """Read an `index.npz` (checked by its own CRCs).

        Raises:
            DataError: missing, damaged, or not an index.
        """
        try:
            with readable_errors("read the index", Path(path)), Path(path).open("rb") as stream:
                stored = np.load(stream, allow_pickle=False)
                return cls(**{field.name: stored[field.name] for field in fields(cls)})
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: the index is damaged ({error}); {REWRITE}") from error


def _row(sample: ShardSample) -> tuple[Any, ...]:
    return sample.key, TASKS.index(sample.record["task"]), sample.json, sample.image, sample.counts


def _scan(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[Any, ...]]:
    """key, task, json place, png place, counts of every sample of a shard, in order."""
    with readable_errors("read a shard", path), path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        samples = _places(path, data)
        for key, members in samples.items():
            if "json" not in members:
                raise DataError(f"{path}: sample {key} has no {key}.json")
            offset, size, _ = members["json"]
            record = _parse(data[offset : offset + size], f"{path}: {key}.json")
            try:
                counts = measure(record, tokenizer)
            except DataError as error:
                raise DataError(f"{path}: {key}: {error}") from error
            yield key, TASKS.index(record["task"]), members["json"], members.get("png", (0, 0, 0)), counts


def _places(path: Path, data: Any) -> dict[str, dict[str, tuple[int, int, int]]]:
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if not member.isreg() or kind not in _MEMBERS:
                    raise DataError(f"{path}: member {member.name!r} is not read: only KEY.json and KEY.png are")
                if kind in samples.setdefault(key, {}):
                    raise DataError(f"{path}: member {member.name!r} occurs twice")
                start, end = member.offset_data, member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                body = data[start : start + member.size]
                samples[key][kind] = (start, member.size, zlib.crc32(body))
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a readable tar ({error}); {REWRITE}") from error
    tail = data[end:]  # tarfile ends silently at a damaged header: a whole tar ends in two blocks of zeros
    if len(tail) < 2 * _BLOCK or any(tail):
        raise DataError(f"{path}: the tar is damaged or cut off at byte {end}; {REWRITE}")
    return samples


def _parse(body: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(body)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(record).__name__}")
    return record


class ShardReader:
    """Reads single samples of an index. Safe to use in forked and spawned workers: it keeps no file position.

    advice: what a shard that differs from the index calls for; `REINDEX` where the shards are not our own.
    """

    def __init__(self, folder: Path, index: ShardIndex, advice: str = REWRITE) -> None:
        self.folder = folder
        self.index = index
        self.advice = advice
        self._files: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, sample: int) -> tuple[dict[str, Any], Array | None]:
        """The record and, if it has an image, its pixels, uint8 [H, W, 3].

        Raises:
            DataError: a shard that is missing, unreadable, cut off or damaged; the line names shard and key.
        """
        record = self.record(sample)
        if not self.index.png[sample, 1]:
            return record, None
        try:
            height, width = image_size(record)
        except DataError as error:
            raise DataError(f"{self._where(sample)}: {error}") from error
        return record, self._pixels(sample, (width, height))

    def record(self, sample: int) -> dict[str, Any]:
        """The record alone. Raises DataError as `read` does."""
        return _parse(self._member(sample, "json"), self.index.name(sample))

    def _pixels(self, sample: int, size: tuple[int, int]) -> Array:
        body = self._member(sample, "png")
        pixels = size[0] * size[1]
        try:
            header = read_header(body, max(pixels, MAX_PIXELS))
            if header[:2] != size or header.mode != "RGB":  # before anything is decoded
                where, found = self._where(sample), f"{header.mode} {tuple(header[:2])}"
                raise DataError(f"{where}: {found}, announced as RGB {size}")
            return decode_image(body, pixels)
        except Refused as fault:
            raise DataError(f"{self._where(sample)}: not a readable image ({fault})") from fault

    def _member(self, sample: int, kind: str) -> bytes:
        offset, size, checksum = (int(value) for value in getattr(self.index, kind)[sample])
        shard = int(self.index.shard[sample])
        with readable_errors("read a shard", self._path(shard)):
            body = os.pread(self._open(shard), size, offset)
        if len(body) != size or zlib.crc32(body) != checksum:
            raise DataError(f"{self._where(sample)}.{kind}: its checksum differs from the index; {self.advice}")
        return body

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            descriptor = open_plain(self._path(shard))
            size, expected = os.fstat(descriptor).st_size, int(self.index.shard_bytes[shard])
            if size != expected:
                os.close(descriptor)
                raise DataError(f"{self._path(shard)}: {size} bytes where the index says {expected}; {self.advice}")
            self._files[shard] = descriptor
        return self._files[shard]

    def _path(self, shard: int) -> Path:
        return self.folder / str(self.index.shards[shard])

    def _where(self, sample: int) -> str:
        return f"{self.folder}/{self.index.name(sample)}"
