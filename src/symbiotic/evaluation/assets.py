"""Files that users bring: where they are looked for, which ones they are, and the packages that read them.

An asset is a path in the config, or lies at its place in the folder that SYMBIOTIC_ASSETS names (the README lists the
places). One that is not there is a `MissingAsset`: a row of the report, never a traceback.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from functools import cache
from pathlib import Path

from symbiotic.data.errors import readable_errors
from symbiotic.evaluation.benchmark import MissingAsset
from symbiotic.schema import ConfigError

ASSETS = "SYMBIOTIC_ASSETS"


def asset(path: str | None, *places: str, key: str, how: str) -> Path:
    """The file or folder of an asset.

    Args:
        path: from the config; null: the first of `places` that exists.
        places: relative to the folder of assets. A pattern (`fid_reference/*.npz`) must match one file.
        key: of the config, for the message: `evaluation.benchmarks.fid.weights`.
        how: where a user gets it, for the message.

    Raises:
        MissingAsset: it is not there.
    """
    if path is not None and not isinstance(path, str):
        raise ConfigError(f"{key}={path}: must be a path, as text")
    if path:
        found = Path(path).expanduser()
        if found.exists():
            return found
        raise MissingAsset(f"{key}={path}: no such file or folder; {how}")
    root = os.environ.get(ASSETS)
    matches = [sorted(Path(root).expanduser().glob(place)) for place in places] if root else []
    several = next((found for found in matches if len(found) > 1), None)
    if several is not None:
        names = ", ".join(found.name for found in several)
        raise MissingAsset(f"{several[0].parent}: {names}: which one? {key}=FILE says it")
    for found_one in matches:
        if found_one:
            return found_one[0]
    looked = " or ".join(f"${ASSETS}/{place}" for place in places)
    state = f"{ASSETS}={root}" if root else f"{ASSETS} is not set"
    raise MissingAsset(f"{places[0]}: no such file; looked for {looked} ({state}); or set {key}=PATH; {how}")


def at_least(key: str, least: int, **values: int) -> None:
    """Raises ConfigError: a value that is too small. key: of the config, above the values' names."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{key}.{name}={value}: must be a whole number, at least {least}")


def package(name: str, extra: str) -> None:
    """Raises MissingAsset: a package is not installed; `extra` of ours brings it."""
    if importlib.util.find_spec(name) is None:
        raise MissingAsset(f"the package {name} is not installed; pip install 'symbiotic[{extra}]'")


def versions(*libraries: str) -> dict[str, str]:
    """The versions of libraries that decide scores, by their names on PyPI; they belong to a protocol.

    Raises:
        MissingAsset: one is not installed.
    """
    try:
        return {name: importlib.metadata.version(name) for name in libraries}
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingAsset(f"the package {error.name} is not installed; pip install 'symbiotic[eval]'") from error


def content_hash(path: str | Path) -> str:
    """16 hexadecimal digits that change with the content of a file; of a folder, with the names and contents in it.

    Hidden files are left out. A file is read once in a process, and again when its size or time changes.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(path)
    with readable_errors("read", path):
        if not path.is_dir():
            return _file_hash(path)[:16]
        files = sorted(p for p in path.rglob("*") if p.is_file())
        names = {str(p.relative_to(path)): p for p in files}
        visible = {name: p for name, p in names.items() if not any(part.startswith(".") for part in Path(name).parts)}
        return digest([f"{name}\0{_file_hash(p)}" for name, p in visible.items()])


def digest(lines: list[str]) -> str:
    """16 hexadecimal digits of lines of text."""
    return hashlib.sha256("".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _file_hash(path: Path) -> str:
    state = path.stat()
    return _sha256(str(path.resolve()), state.st_size, state.st_mtime_ns)


@cache
def _sha256(path: str, size: int, mtime: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # in chunks
