"""Whole-file writes, hashes and locks. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from symbiotic.schema import ConfigError

log = logging.getLogger(__name__)

WRITING = ".writing"
"""How the name of a file ends that is being written, or that a killed process left behind."""

PACKAGE = Path(__file__).resolve().parent


def digest(value: Any) -> str:
    """12 hexadecimal digits of a plain container."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def source_hash(*parts: str) -> str:
    """Of the Python sources below these sub-packages (all, when none is named): results of other code do not mix."""
    roots = [PACKAGE / part for part in parts] or [PACKAGE]
    files = sorted(f for root in roots for f in ([root] if root.is_file() else root.rglob("*.py")))
    text = b"".join(str(f.relative_to(PACKAGE)).encode() + f.read_bytes() for f in files)
    return hashlib.sha256(text).hexdigest()[:12]


def commit(
    path: Path, write: Callable[[Path], Any], *, need: int = 0, manifest: Mapping[str, Any] | None = None
) -> Path:
    """Call `write(temporary path)` beside `path`, wait for the disk, rename: the file appears whole or not at all.

    need: bytes that must be free before anything is written.
    manifest: facts to keep in `<path>.json` with the file's size and SHA-256. It gets its name last, so that a file
    that it describes is complete (see `uncommitted`); its bytes are on the disk before, so that a disk that is full by
    then costs nothing.

    Raises:
        OSError: whatever the system refuses; no part of the file is left, and an older one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    have = shutil.disk_usage(path.parent).free if need else 0
    if have < need:
        raise OSError(errno.ENOSPC, f"need {need / 2**20:.0f} MB, have {have / 2**20:.0f} MB", str(path))
    temporary, about = writing(path), writing(manifest_of(path))
    try:
        with naming(path):
            write(temporary)
        with ThreadPoolExecutor(1) as pool:  # the disk is waited for while the checksum is computed
            found = None if manifest is None else pool.submit(checksum, temporary)
            sync(temporary)
        if found is not None:
            facts = checked({**(manifest or {}), "bytes": temporary.stat().st_size, "sha256": found.result()})
            about.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            sync(about)
            manifest_of(path).unlink(missing_ok=True)  # of an older file: a kill from here on leaves no wrong one
        temporary.replace(path)
        if found is not None:
            sync(path.parent)
            about.replace(manifest_of(path))
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            about.unlink(missing_ok=True)
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses inside is of this file: the error of a write names none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def writing(path: Path) -> Path:
    """Beside a path, the name under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}{WRITING}")


def described(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of files that are on the disk by then."""
    found = {}
    for file in files:
        sync(file)
        found[file.name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
    return found


def commit_folder(temporary: Path, path: Path, manifest: Mapping[str, Any]) -> Path:
    """Rename a folder whose files are on the disk; what was at `path` is removed before.

    manifest: what is kept in `<path>.json`, `files` (see `described`) among it. As with `commit`, it is written last.
    """
    sync(temporary)
    remove(path)
    temporary.replace(path)
    sync(path.parent)
    write_json(manifest_of(path), checked(manifest))
    return path


def checked(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a checksum of its own."""
    return {**manifest, "check": digest(dict(manifest))}


def read_manifest(path: Path) -> dict[str, Any]:
    """What the manifest of a file or folder says; nothing where it is damaged, or there is none."""
    found = read_json(manifest_of(path))
    if not isinstance(found, dict):
        return {}
    facts = {key: value for key, value in found.items() if key != "check"}
    return facts if found.get("check", digest(facts)) == digest(facts) else {}  # of older code there is no check


def remove(path: Path) -> None:
    """A file or folder with its manifest, which goes first: what is left when a kill comes between is not whole."""
    manifest_of(path).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def manifest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def uncommitted(path: Path) -> str | None:
    """Why a file that `commit` wrote with a manifest, or a folder, cannot be trusted, or None. Reads all of it."""
    about = read_manifest(path)
    if path.is_dir() and isinstance(about.get("files"), dict):
        problems = ((name, _differs(path / name, facts)) for name, facts in about["files"].items())
        return next((f"{name}: {problem}" for name, problem in problems if problem), None)
    if path.is_dir() or not {"bytes", "sha256"} <= set(about):
        return f"no sound {manifest_of(path).name}: its writing did not come to an end"
    return _differs(path, about)


def _differs(path: Path, about: Mapping[str, Any]) -> str | None:
    try:
        if path.stat().st_size != about.get("bytes"):
            return f"{path.stat().st_size} bytes where {about.get('bytes')} were written"
        return None if checksum(path) == about.get("sha256") else "its checksum is not that of what was written"
    except OSError as error:
        return str(error.strerror)


def announced(path: Path) -> bool:
    """Whether a manifest says that the file, or folder, is complete; unlike `uncommitted` it reads nothing of it."""
    about = read_manifest(path)
    inside = about.get("files") if path.is_dir() else {"": about}
    if not about or not isinstance(inside, dict):
        return False
    files = {path / name if name else path: facts for name, facts in inside.items()}
    return all(file.is_file() and file.stat().st_size == facts.get("bytes") for file, facts in files.items())


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Remove what killed processes left half written below a folder; returns what it was."""
    found = sorted(folder.rglob(f".*{WRITING}")) if folder.is_dir() else []
    litter = [path for path in found if not _lives(path.name.removesuffix(WRITING).rpartition(".")[2])]
    for path in litter:
        remove(path)
    return litter


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return int(process) != os.getpid()


def write_json(path: Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> Path:
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> Path:
    return commit(path, lambda p: p.write_bytes(data))


def read_json(path: Path) -> Any:
    """The content, or None when there is no such file or it is no JSON (a kill never leaves that; a full disk may)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_objects(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, that have these keys; one that a kill cut off is left out, and so,
    with a warning, are damaged ones."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    found = [_object(line) for line in lines]
    sound = [value for value in found if value is not None and set(keys) <= set(value)]
    if damaged := sum(bool(line.strip()) for line in lines[:-1]) + (found[-1] is not None) - len(sound):
        say_damaged(path, damaged)
    return sound


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@cache
def say_damaged(path: Path, lines: int) -> None:
    """Once for each number of lines, for a file is read again and again."""
    log.warning("%s: %d damaged lines are left out", path, lines)


def unreadable(path: Path) -> bool:
    """Whether a file is there and is no JSON."""
    return path.exists() and read_json(path) is None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; a second one says that it waits. The lock of a dead process is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def weights_of(path: str, names: Iterable[str], key: str, get: str) -> Path:
    """The file of weights that `path` is, or the first of `names` in the folder that it is.

    Raises:
        ConfigError: there is none; the line says which, where it was looked for, and how to get it.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    found = [given / name for name in names if (given / name).is_file()]
    if found:
        return found[0]
    what = f"no {' or '.join(names)} in it" if given.is_dir() else "no such file or folder"
    raise ConfigError(f"{key}.path={path} (looked for at {given.resolve()}): {what}; {get}")
