"""Records that stand in files of their own, .jsonl, .json (one list) or .parquet; their images in a folder or tars.

Each is read once, from first to last, into the same events as a tar is, and can be gone on with at an offset: of bytes,
in a .parquet of rows.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symbiotic.data.bad import BadSample, Refused, printable
from symbiotic.data.checks import Checks, Place, ShardSample, judged
from symbiotic.data.errors import DataError
from symbiotic.data.records import check_depth, parse_record
from symbiotic.data.scan import Event, ShardEnd, opened, read_shard
from symbiotic.data.tar import RECORDS, LocalSource, OpenSource, Source, find_files, open_plain, read_members, suffix_of

_CHUNK = 1 << 20  # bytes read at a time
_MAX_LINE, _MAX_LIST, _MAX_IMAGE = 16 << 20, 1 << 30, 64 << 20  # bytes

_DECODED = 256 << 20
"""Bytes of a parquet file that are decoded at a time, about."""

Row = tuple[int, int, bytes | dict[str, Any] | Refused]
"""(its offset, that of the next one, what stands there)."""


def read_file(
    name: str, checks: Checks, start: int = 0, open_source: OpenSource = LocalSource, unique: bool = True
) -> Iterator[Event]:
    """Everything in a file of samples from the offset `start` on; at last a `ShardEnd`. unique: see `read_shard`."""
    suffix = suffix_of(name)
    if suffix not in RECORDS:
        yield from read_shard(name, checks, start, open_source, unique)
        return
    records = {".jsonl": _lines, ".json": _items}.get(suffix, _rows)
    yield from opened(name, open_source, lambda file: _events(name, file, checks, start, records))


def _events(name: str, source: Source, checks: Checks, start: int, rows: Any) -> Iterator[Event]:
    images = ImageStore(checks.origin.images) if checks.origin and checks.origin.images else None
    stop, seen, bad, unread = start, start > 0, None, 0
    try:
        for offset, after, found in rows(source, start):
            seen, stop = True, after
            yield Event(name, after, _judge(name, offset, found, checks, images))
    except Refused as fault:
        reason = printable(f"{fault.reason}; nothing is read from {stop} on")
        bad = BadSample(name, "", fault.kind, reason)
    except OSError as error:
        bad = BadSample(name, "", "unreadable_shard", printable(error.strerror or error))
    if bad is not None:
        unread = source.size - stop if rows is not _rows else source.size
    elif not seen:
        bad = BadSample(name, "", "empty_shard", f"no sample in {source.size} bytes")
    yield Event(name, None, ShardEnd(source.size, unread, bad))


def _judge(
    name: str, offset: int, found: bytes | dict[str, Any] | Refused, checks: Checks, images: ImageStore | None
) -> ShardSample | BadSample:
    key = f"at-{offset}"
    try:
        if isinstance(found, Refused):
            raise found
        body = found if isinstance(found, bytes) else json.dumps(found, default=str).encode()
        raw = parse_record(found, strict=False) if isinstance(found, bytes) else found
        if isinstance(raw.get("id"), (str, int)):
            key = str(raw["id"])
        adapter = checks.foreign.adapter if checks.foreign else None
        names = adapter.refs(raw) if adapter is not None else []
        if names and images is None:
            raise Refused("missing_image", f"it names {names[0]}; images= must say in which folder or tars they lie")
        bodies = [images.read(ref) for ref in names] if images is not None else []
        files = [(Place(0, len(image), zlib.crc32(image)), image) for image in bodies]
        return judged(name, printable(key), raw, Place(offset, len(body), zlib.crc32(body)), files, checks)
    except Refused as fault:
        return BadSample(name, printable(key), fault.kind, fault.reason)


def _lines(source: Source, start: int) -> Iterator[Row]:
    """Lines that are not empty."""
    at, rest, skipping = start, b"", False
    while at + len(rest) < source.size:
        rest += source.read(at + len(rest), min(_CHUNK, source.size - at - len(rest)))
        *lines, rest = rest.split(b"\n")
        for line in lines:
            after = at + len(line) + 1
            if skipping:
                yield at, after, Refused("oversized_member", f"a line of more than {_MAX_LINE:,} bytes")
            elif line.strip():
                yield at, after, line
            at, skipping = after, False
        if len(rest) > _MAX_LINE:
            at, rest, skipping = at + len(rest), b"", True
    if rest.strip() or skipping:
        fault = Refused("oversized_member", f"a line of more than {_MAX_LINE:,} bytes")
        yield at, source.size, fault if skipping else rest


def _items(source: Source, start: int) -> Iterator[Row]:
    """The objects of one list. Raises Refused: no such list, one too large, or no JSON from some place on."""
    if source.size > _MAX_LIST:
        large = f"a list of {source.size:,} bytes, more than {_MAX_LIST:,}"
        raise Refused("oversized_member", f"{large}; write it as .jsonl, which is read line by line")
    body = source.read(start, source.size - start)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Refused("text_not_utf8", str(error)) from error
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    opening = re.match(r"\s*\[", text)
    if start == 0 and opening is None:
        raise Refused("not_json", "it does not begin with [; must be a list of records")
    place = opening.end() if start == 0 and opening else 0
    at = start + len(text[:place].encode())
    while True:
        begun = gap.match(text, place)
        assert begun is not None
        at, place = at + begun.end() - place, begun.end()  # blanks and commas: a byte each
        if text[place : place + 1] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise Refused("not_json", f"no JSON at byte {at} ({error})") from error
        length = len(text[place:end].encode())
        yield at, at + length, _item(value, text[place:end], length)
        at, place = at + length, end


def _item(value: Any, text: str, length: int) -> dict[str, Any] | Refused:
    """An object of a list, or what is wrong with it, by the rules for a line of its own."""
    if length > _MAX_LINE:
        return Refused("oversized_member", f"a record of {length:,} bytes, more than {_MAX_LINE:,}")
    if not isinstance(value, dict):
        return Refused("json_not_object", f"must be a JSON object, not {type(value).__name__}")
    try:
        check_depth(text)
    except Refused as fault:
        return fault
    return value


def _rows(source: Source, start: int) -> Iterator[Row]:
    """Rows of a .parquet, by number. Raises Refused: damaged. Raises DataError: no library for it."""
    parquet = parquet_library()
    from pyarrow.lib import ArrowException

    number = 0
    try:
        file = parquet.ParquetFile(_AsFile(source))
        for group in range(file.num_row_groups):
            about, at = file.metadata.row_group(group), number
            number += about.num_rows
            if number <= start:
                continue
            some = max(16, min(1024, _DECODED // max(1, about.total_byte_size)))  # a value may stand in every row
            for batch in file.iter_batches(some, row_groups=[group]):
                for row in batch.to_pylist():
                    if at >= start:
                        yield at, at + 1, row
                    at += 1
    except (ArrowException, OSError, ValueError) as error:
        raise Refused("unreadable_shard", f"not a readable parquet file ({str(error).splitlines()[0]})") from error


def parquet_library() -> Any:
    """Raises DataError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading .parquet needs pyarrow: pip install 'symbiotic[data]'") from error
    return pyarrow.parquet


class _AsFile(io.RawIOBase):
    """A source as a file that can be sought in."""

    def __init__(self, source: Source) -> None:
        self.source, self.at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.source.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        found = self.source.read(self.at, min(len(buffer), max(0, self.source.size - self.at)))
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


class ImageStore:
    """Images by name: files below a folder, or members of tars."""

    def __init__(self, given: Sequence[str]) -> None:
        folder = Path(given[0]).resolve()
        is_folder = len(given) == 1 and folder.is_dir() and not any(folder.glob("*.tar"))
        self.given, self.folder = tuple(given), folder if is_folder else None

    def read(self, name: str) -> bytes:
        """Raises Refused: no such image, one too large, or a name that leads out of the folder."""
        if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
            raise Refused("unsafe_name", f"the image {name} leads out of the folder")
        body = self._of_tars(name) if self.folder is None else self._of_folder(name, self.folder)
        if not 0 < len(body) <= _MAX_IMAGE:
            raise Refused("oversized_member" if body else "empty_member", f"{name} has {len(body):,} bytes")
        return body

    def _of_folder(self, name: str, folder: Path) -> bytes:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise Refused("unsafe_name", f"the image {name} leads out of the folder")
        try:
            with os.fdopen(open_plain(path), "rb") as file:
                return file.read(_MAX_IMAGE + 1)
        except OSError as error:
            raise Refused("missing_image", f"{name}: {error.strerror} in {folder}") from error

    def _of_tars(self, name: str) -> bytes:
        place = members_of(self.given).get(name)
        if place is None:
            raise Refused("missing_image", f"{name}: in none of {len(self.given)} tars of images")
        tar, offset, size = place
        with LocalSource(tar) as source:
            return source.read(offset, min(size, _MAX_IMAGE + 1))


@functools.lru_cache(maxsize=8)
def members_of(tars: tuple[str, ...]) -> dict[str, tuple[str, int, int]]:
    """Name -> (tar, offset, size) of the plain files in tars; of two with one name the first.

    Raises:
        DataError: a tar that cannot be read to its end.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for tar in find_files(tars, "images", (".tar",)):
        try:
            with LocalSource(tar) as source:
                for member in read_members(source):
                    if member.is_file:
                        found.setdefault(member.name, (tar, member.offset, member.size))
        except (OSError, Refused) as error:
            raise DataError(f"{tar}: a tar of images that cannot be read ({error})") from error
    return found
