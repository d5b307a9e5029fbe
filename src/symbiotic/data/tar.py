"""A sequential reader of plain tars that says where and why it stopped, which `tarfile` and webdataset do not.

Headers are parsed and checked by `tarfile.TarInfo`; long names (GNU) and extended headers (pax) are understood. No
member is written anywhere, no link is followed, and a name is never used as a path.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from symbiotic.data.bad import Refused, printable
from symbiotic.data.errors import DataError
from symbiotic.schema import ConfigError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENSION = 64 * 1024  # bytes of a long name or an extended header
_MAX_EXTENSIONS = 16  # headers before a member's own; writers make up to three
_MAX_TAIL = (
    16 << 20
)  # bytes of zeros behind the end mark that are looked at; writers fill up to 10,240, or a tape's block
_MAX_NAME = 255
_PAX = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_EXTENSIONS = {*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)


RECORDS = (".jsonl", ".json", ".parquet")
"""Files of records without images."""


def suffixes_of(layout: str) -> tuple[str, ...]:
    """Of the files that may hold samples of a format (see `adapters`)."""
    return {"own": (".tar",), "img2dataset": (".tar",), "text": RECORDS}.get(layout, (*RECORDS, ".tar"))


def suffix_of(name: str) -> str:
    """`.tar` of a path, and of an address with what follows a question mark."""
    return Path(name.partition("?")[0] if "://" in name else name).suffix.lower()


class Source(Protocol):
    """Bytes of one shard, wherever it lies. `read` may raise OSError."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there; fewer only at the end."""
        ...


OpenSource = Callable[[str], AbstractContextManager[Source]]
"""Shard name -> its bytes; opened in the process that reads them. May raise OSError."""


class LocalSource:
    """A file. A name is a path and nothing else: `pipe:`, `file:` or `http:` have no meaning here."""

    def __init__(self, path: str | Path) -> None:
        self._file = open_plain(path)
        self.size = os.fstat(self._file).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset)

    def __enter__(self) -> LocalSource:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def open_plain(path: str | Path) -> int:
    """The descriptor of a file, without waiting for whoever is at the other end of a pipe.

    Raises:
        OSError: as `os.open`, and EINVAL where it is a folder, pipe, socket or device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no plain file: a folder, pipe, socket or device", str(path))
    return descriptor


def check_local(name: str) -> str:
    """Raises DataError: a name that other readers would take for a command or an address, or that cannot be shown."""
    if not name.isprintable():
        raise DataError(f"{printable(name)}: a shard's name must hold no control characters")
    if found := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise DataError(f"{name}: {found[0]} is not read: a shard must be a local tar file; no command is ever run")
    return name


def find_shards(given: Sequence[str], key: str) -> list[str]:
    """Files of a list of files, folders of .tar files, and patterns; sorted, each once. key: for messages.

    Raises:
        ConfigError: there are none, or one is no local file.
    """
    return find_files(given, key, (".tar",))


def find_files(given: Sequence[str], key: str, suffixes: Sequence[str]) -> list[str]:
    """As `find_shards`; suffixes: of the files that are taken from a folder."""
    found: set[str] = set()
    listed = ", ".join(suffixes)
    what_is_right = "must be tar files, a folder of them, or a pattern"
    if suffixes != (".tar",):
        what_is_right = f"must be files ({listed}), a folder of them, or a pattern"
    for part in given:
        try:
            path = Path(check_local(part))
            inside = (match for match in path.glob("*") if match.suffix.lower() in suffixes) if path.is_dir() else None
            matches = path.parent.glob(path.name) if inside is None else inside
            files = [path] if path.is_file() else [match for match in matches if match.is_file()]
            found |= {check_local(str(file)) for file in files}
        except DataError as error:
            raise ConfigError(f"{key}={error}") from error
        except (ValueError, NotImplementedError) as error:  # of glob
            raise ConfigError(f"{key}={part}: no pattern ({error}); {what_is_right}") from error
        if not files:
            special = "no plain file" if path.exists() else "no such file"
            what = f"no {listed} in this folder" if path.is_dir() else special
            raise ConfigError(f"{key}={part}: {what}; {what_is_right}")
    if not found:
        raise ConfigError(f"{key}=: {what_is_right}")
    return sorted(found)


class Member(NamedTuple):
    """A member of a tar; all places in bytes."""

    name: str
    is_file: bool  # a plain one: no link, device or sparse file
    start: int  # of its first header
    offset: int  # of its body
    size: int
    end: int  # where the next header stands


def read_members(source: Source, start: int = 0) -> Iterator[Member]:
    """The members from a header at `start` on, without directories.

    Raises:
        Refused: the tar cannot be read on; `offset` is where the rest begins.
    """
    offset, extended, headers = start, _Extended(), 0
    while source.size:  # an empty file has no members, and no damage either
        header = _read(source, offset, BLOCK, start)
        if header == _ZEROS and offset == start:
            return _check_end(source, offset)
        info = _parse(header, start, "not_a_tar" if offset == 0 else "damaged_header")
        body = offset + BLOCK
        if info.type in _EXTENSIONS:
            headers += 1
            if info.size > _MAX_EXTENSION:
                raise Refused("damaged_header", f"an extended header of {info.size} bytes at byte {offset}", start)
            if headers > _MAX_EXTENSIONS:
                raise Refused("damaged_header", f"{headers} extended headers of one member at byte {start}", start)
            extended.add(info.type, _read(source, body, info.size, start), start)
            offset = body + _padded(info.size)
            continue
        name = info.name if extended.name is None else extended.name
        name = name.removeprefix("./")
        is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not extended.sparse
        has_body = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES  # as tarfile has it
        size = (info.size if extended.size is None else extended.size) if has_body else 0
        if body + size > source.size:
            reason = f"{name} ends at byte {body + size}, the shard at byte {source.size}"
            raise Refused("truncated_shard", reason, start, split_name(name)[0])
        end = body + _padded(size)
        if not info.isdir():
            yield Member(name, is_file, start, body, size, end)
        offset = start = end
        extended, headers = _Extended(), 0


def read_body(source: Source, member: Member) -> bytes:
    """Raises Refused: the system cannot read it, or it ends early after all."""
    return _read(source, member.offset, member.size, member.start, split_name(member.name)[0])


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member, cut at the first point behind the last slash, as webdataset does."""
    found = _KEY.fullmatch(name)
    return (found[1], found[2].lower()) if found else (name, "")


def check_name(name: str) -> None:
    """Raises Refused: a name that could do harm where names become paths, or would make an index huge."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise Refused("unsafe_name", f"{name} leads out of the folder")
    if not name or not name.isprintable():
        raise Refused("unsafe_name", f"{name!r} holds characters that cannot be shown")
    if len(name.encode()) > _MAX_NAME:
        raise Refused("unsafe_name", f"a name of {len(name.encode())} bytes, more than {_MAX_NAME}")


def _read(source: Source, offset: int, length: int, start: int, key: str = "") -> bytes:
    try:
        found = source.read(offset, length)
    except OSError as error:
        reason = f"the system cannot read byte {offset} ({error.strerror or error})"
        raise Refused("unreadable_shard", reason, start, key) from error
    if len(found) < length:
        reason = f"the shard ends at byte {offset + len(found)} without an end mark"
        raise Refused("truncated_shard", reason, start, key)
    return found


def _parse(header: bytes, start: int, kind: str) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise Refused(kind, f"no tar header at byte {start} ({error})", start) from error
    if info.size < 0:
        raise Refused(kind, f"a member of {info.size} bytes at byte {start}", start)
    return info


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_end(source: Source, offset: int) -> None:
    """Raises Refused: an end mark of one block, or behind it something else than zeros, or more than any writer puts
    there."""
    at, step, tail = offset, 1 << 20, source.size - offset
    if tail > _MAX_TAIL:
        raise Refused("data_after_end", f"an end mark at byte {offset}, and {tail:,} bytes of it", offset)
    if source.size - offset < 2 * BLOCK:
        raise Refused("truncated_shard", f"half an end mark at byte {offset}", offset)
    while at < source.size:
        block = _read(source, at, min(step, source.size - at), offset)
        if block.count(0) != len(block):
            raise Refused("data_after_end", f"an end mark at byte {offset}, and data behind it", offset)
        at += len(block)


class _Extended:
    """What the headers before a member's own say about it."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.sparse = False

    def add(self, kind: bytes, body: bytes, start: int) -> None:
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind in _PAX:
            try:
                records = dict(_pax_records(body))
                self.size = int(records["size"]) if "size" in records else self.size
            except ValueError as error:
                raise Refused("damaged_header", f"an unreadable extended header at byte {start}", start) from error
            if self.size is not None and self.size < 0:
                raise Refused("damaged_header", f"a member of {self.size} bytes at byte {start}", start)
            self.name = records.get("path", self.name)
            self.sparse |= any(key.startswith("GNU.sparse") for key in records)


def _pax_records(body: bytes) -> Iterator[tuple[str, str]]:
    """`LENGTH KEY=VALUE` lines; the length counts all of its line. Raises ValueError."""
    body = body.rstrip(b"\0")
    while body:
        digits, _, _ = body.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        line, body = body[:length], body[length:]
        key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if not equals or not line.endswith(b"\n"):
            raise ValueError("not a pax record")
        yield key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")
