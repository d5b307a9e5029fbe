"""Whole-file writes, hashes and locks. Standard library only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def replace_with(path: Path, write: Any) -> Path:
    """Call `write(temporary path)` beside `path`, then rename: the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    return replace_with(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def write_text(path: Path, text: str) -> Path:
    return replace_with(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The content, or None when there is no such file or it is no JSON (a kill never leaves that; a full disk may)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


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
