"""Files in stores, HTTP(S) or any that fsspec knows, read in ranges, each block once: it then lies in a local cache.

A cache entry is a sparse file and a table of CRC-32s: a block counts only if it has its checksum, so a killed process
or a torn write costs one block. Processes share entries; of several that want a block one fetches it. What is not to be
had after all retries ends the run in one line, and never counts as bad data: a run that is started again goes on there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.data.bad import printable
from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.tar import LocalSource
from symbiotic.files import digest, read_json, write_json
from symbiotic.redact import redacted
from symbiotic.schema import ConfigError

log = logging.getLogger(__name__)

BLOCK = 4 << 20
"""Bytes that are fetched at a time."""
SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "memory")
"""Of addresses that are read. Others, and chains of them (`::`), can name commands and files, and are not."""
_ENTRY = struct.Struct("<II")  # checksum of a block, and 1 where there is one
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LONGEST_WAIT = 30.0  # seconds between two attempts
_PASSING = (408, 425, 429)  # of the statuses of 400 and more that are the client's fault, those that may pass


def is_remote(name: str) -> bool:
    return "://" in name


def addresses(part: str, key: str) -> dict[str, str]:
    """Name to be shown -> address, of an address with at most one range `{00000..00099}`; in stores that can be listed,
    of a pattern. Passwords and signatures are not shown. key: for messages.

    Raises:
        ConfigError: a scheme that is not read, a library that is missing, a pattern that nothing fits.
    """
    shown = redacted(part)
    scheme = part.partition("://")[0]
    if scheme not in SCHEMES or "::" in part or not part.isprintable():
        raise ConfigError(f"{key}={printable(shown)}: not read; must be a file, or an address of {', '.join(SCHEMES)}")
    _check_library(scheme, f"{key}={shown}")
    found = _RANGE.search(part)
    if found:
        first, last = found.groups()
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        listed = [part[: found.start()] + number + part[found.end() :] for number in numbers]
    elif "*" in part and not scheme.startswith("http"):
        listed = _listed(part, scheme, f"{key}={shown}")
    else:
        listed = [part]
    if not listed or ("*" in part and scheme.startswith("http")):
        raise ConfigError(f"{key}={shown}: no such files; name them, over HTTP as NAME-{{00000..00099}}.tar")
    return {redacted(address): address for address in listed}


def _check_library(scheme: str, where: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _listed(pattern: str, scheme: str, where: str) -> list[str]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(pattern)
        return [f"{scheme}://{str(name).lstrip('/')}" for name in sorted(store.glob(path))]
    except Exception as error:  # whatever the store's own library raises
        raise ConfigError(f"{where}: cannot be listed ({_reason(error)})") from error


@dataclass(frozen=True)
class Fetching:
    """How stores are read.

    cache: folder of the blocks. cache_gb: what it may hold; entries that were opened longest ago go first.
    retries: attempts behind the first. wait: seconds before the second attempt, then twice as long each time.
    timeout: seconds without a byte after which an attempt is given up.
    """

    cache: str
    cache_gb: float = 50.0
    retries: int = 8
    wait: float = 0.5
    timeout: float = 60.0

    def check(self, key: str) -> None:
        """Raises ConfigError: a number out of range. key: prefix of its keys in messages."""
        for name, value in (("cache_gb", self.cache_gb), ("timeout", self.timeout)):
            if value <= 0:
                raise ConfigError(f"{key}{name}={value:g}: must be positive")
        for name, value in (("retries", self.retries), ("wait", self.wait)):
            if value < 0:
                raise ConfigError(f"{key}{name}={value:g}: must not be negative")


class Opener:
    """Name of a file -> its bytes, from the disk or from a store; what streams open their files by.

    Args:
        remote: name that is shown -> address; all other names are paths.
    """

    def __init__(self, remote: Mapping[str, str], fetching: Fetching) -> None:
        self.remote, self.fetching = dict(remote), fetching

    def __call__(self, name: str) -> Any:
        """Raises OSError (of files), DataError (of stores)."""
        if name not in self.remote:
            return LocalSource(name)
        return RemoteSource(name, self.remote[name], self.fetching)


class RemoteSource:
    """A file in a store, as a `tar.Source`.

    Raises:
        DataError: it cannot be read, is not served in ranges, or is not the one that was cached.
    """

    def __init__(self, name: str, address: str, fetching: Fetching) -> None:
        self.name, self.address, self.fetching = name, address, fetching
        self.folder = Path(fetching.cache) / "blocks" / digest(name)
        self._block: tuple[int, bytes] = (-1, b"")
        with readable_errors("write the cache of streams", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock, self._data, self._table = (
                os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in ("lock", "data", "table")
            )
        try:
            self.size = self._find()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RemoteSource:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._data, self._table, self._lock):
            os.close(descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there; fewer only at the end. Raises DataError, never OSError."""
        end = min(offset + length, self.size)
        parts = [self._of_block(number) for number in range(offset // BLOCK, -(-end // BLOCK))] if end > offset else []
        start = offset // BLOCK * BLOCK
        return b"".join(parts)[offset - start : end - start]

    def _of_block(self, number: int) -> bytes:
        if self._block[0] != number:
            with readable_errors("write the cache of streams", self.folder):
                body = self._cached(number)
                if body is None:
                    with _held(self._lock):  # of several processes one fetches it
                        body = self._cached(number)
                        body = self._fetch(number) if body is None else body
            self._block = (number, body)
        return self._block[1]

    def _cached(self, number: int) -> bytes | None:
        entry = os.pread(self._table, _ENTRY.size, number * _ENTRY.size)
        checksum, there = _ENTRY.unpack(entry) if len(entry) == _ENTRY.size else (0, 0)
        if not there:
            return None
        body = os.pread(self._data, self._length(number), number * BLOCK)
        return body if len(body) == self._length(number) and zlib.crc32(body) == checksum else None

    def _length(self, number: int) -> int:
        return min(BLOCK, self.size - number * BLOCK)

    def _fetch(self, number: int) -> bytes:
        start, length = number * BLOCK, self._length(number)

        def attempt(store: Any, path: str) -> bytes:
            body = bytes(store.cat_file(path, start=start, end=start + length))
            if len(body) == self.size > length:
                raise DataError(f"{self.name}: its server answers with the whole file; it must serve ranges")
            if len(body) != length:
                raise OSError(f"{len(body)} bytes where {length} were asked for")
            return body

        body = self._insist(attempt)
        os.pwrite(self._data, body, start)
        os.pwrite(self._table, _ENTRY.pack(zlib.crc32(body), 1), number * _ENTRY.size)
        return body

    def _find(self) -> int:
        """Its size; from the cache alone where all of it is there."""
        with readable_errors("write the cache of streams", self.folder), _held(self._lock):
            known = read_json(self.folder / "about.json")
            if known is None or not self._whole(known["size"]):
                found = self._insist(lambda store, path: _about(store.info(path)))
                if known is not None and {**known, **found} != known:
                    way = f"remove {self.folder} to read it anew, in a run that begins"
                    raise DataError(f"{self.name}: it is not the one that was read before; {way}")
                known = {**found, "name": self.name}
            write_json(self.folder / "about.json", known)  # its time is that of the last opening
            _make_room(self.folder, self.fetching.cache_gb * 1e9)
        return int(known["size"])

    def _whole(self, size: int) -> bool:
        entries = os.pread(self._table, os.fstat(self._table).st_size, 0)
        return len(entries) == -(-size // BLOCK) * _ENTRY.size and all(
            there for _, there in _ENTRY.iter_unpack(entries)
        )

    def _insist(self, attempt: Callable[[Any, str], Any]) -> Any:
        """What an attempt gives, tried again while the fault may pass. Raises DataError."""
        for number in range(self.fetching.retries + 1):
            try:
                return attempt(*_store(self.address, self.fetching.timeout))
            except DataError:
                raise
            except Exception as raised:  # whatever the store's own library raises
                error = _cause(raised)
                reason = _reason(error).replace(self.address, self.name)
                if not _may_pass(error):
                    raise DataError(f"{self.name}: cannot be read ({reason})") from error
                if number == self.fetching.retries:
                    way = "started again, a run goes on where it stopped"
                    raise DataError(f"{self.name}: not to be had in {number + 1} attempts ({reason}); {way}") from error
                log.warning("%s: %s; trying again", self.name, reason)
                time.sleep(min(_LONGEST_WAIT, self.fetching.wait * 2**number))
        raise AssertionError("unreachable")


def _store(address: str, timeout: float) -> tuple[Any, str]:
    """fsspec's object, kept by fsspec for each process, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if address.startswith("http"):
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options = {"client_kwargs": {"timeout": patience}, "encoded": True}  # a signature holds for its very spelling
        options["headers"] = {"Accept-Encoding": "identity"}
    store, path = fsspec.core.url_to_fs(address, **options)
    return store, path


def _cause(error: Exception) -> BaseException:
    """What is behind an error: over HTTP fsspec says of every fault that there is no such file."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def _about(info: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(info.get("size"), int):
        raise DataError("its store does not tell its size")
    tags = {key: str(info[key]) for key in ("ETag", "etag", "md5Hash", "Last-Modified") if info.get(key)}
    return {"size": info["size"], **tags}


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may help: not if there is no such file, or no right to read it."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in _PASSING or status < 400
    return not isinstance(error, (FileNotFoundError, PermissionError, ImportError, NotADirectoryError))


def _reason(error: BaseException) -> str:
    status = getattr(error, "status", None)
    text = f"status {status}" if isinstance(status, int) else " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        text = "no such file"
    return printable(redacted(text)) or type(error).__name__


@contextmanager
def _held(lock: int) -> Iterator[None]:
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def _make_room(folder: Path, limit: float) -> None:
    """Remove the entries that were opened longest ago, but for this one. Who reads one keeps what it has open."""
    ages: list[tuple[float, int, Path]] = []
    for entry in folder.parent.iterdir():
        with suppress(OSError):  # another process was faster
            used = (entry / "data").stat().st_blocks * 512 if (entry / "data").is_file() else 0
            ages.append(((entry / "about.json").stat().st_mtime, used, entry))
    total = sum(used for _, used, _ in ages)
    for _, used, entry in sorted(ages):
        if total > limit and entry != folder:
            shutil.rmtree(entry, ignore_errors=True)
            total -= used
