"""The files around a fit: parameters, where results come from, and the line that each step of the arc prints."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from symbiotic.files import (
    PACKAGE,
    commit,
    digest,
    locked,
    manifest_of,
    read_json,
    source_hash,
    uncommitted,
    write_bytes,
    write_json,
    write_text,
)
from symbiotic.schema import RunError
from symbiotic.training.finite import not_finite

log = logging.getLogger(__name__)

__all__ = ["commit", "digest", "locked", "read_json", "source_hash", "write_bytes", "write_json", "write_text"]

OUTSIDE = ("studies", "launch.py", "claim.py")
"""Sources that start runs and read finished ones: a better table, or another order of runs, changes no result."""

DECIDING = ("studies/benchmarks.py",)
"""Of these, what decides a result all the same: which benchmarks a run is measured on."""


def run_code() -> str:
    """Hash of the sources that decide what a run computes."""
    parts = (path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py") and path.name != "__pycache__")
    return source_hash(*(part for part in parts if part not in OUTSIDE), *DECIDING)


VERSIONS = ("torch", "numpy", "lightning")
"""Packages whose other versions compute other results."""


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def provenance() -> dict[str, str]:
    """What a result needs to be comparable: code, commit, versions, machine kind (no host name)."""
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    hydra = importlib.metadata.version("hydra-core")
    made = {"code": run_code(), "commit": described, "python": platform.python_version(), "hydra-core": hydra}
    return made | versions()


def save_state(path: Path, state: Mapping[str, Tensor], **metadata: str) -> Path:
    """Parameters as safetensors.

    Raises:
        RunError: the file could not be written, for one because the disk is full, or a parameter is not finite.
    """
    if lost := not_finite(state):
        raise RunError(f"{path}: not written: {lost} is not finite")
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    size = sum(value.nbytes for value in plain.values())
    try:
        return commit(path, lambda p: save_file(plain, p, metadata=metadata), need=size, manifest=metadata)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"{path}: not written: {reason}") from error


def load_state(path: Path) -> dict[str, Tensor]:
    """Parameters from safetensors, or from the checkpoint of a run (`checkpoints/step=….ckpt`).

    Every byte is checked where the file's manifest lies beside it (neither format finds a flipped bit by itself).

    Raises:
        RunError: no such file, or one that is neither.
    """
    if not path.exists():
        raise RunError(f"{path}: no such checkpoint; a parent is a .safetensors or .ckpt file of an earlier run")
    damage = uncommitted(path) if manifest_of(path).is_file() else None
    if damage is not None:
        raise RunError(f"{path}: damaged ({damage})")
    try:
        if path.suffix == ".ckpt":
            from symbiotic.callbacks.sharded_checkpoint import load  # Lightning, by its package: seconds

            state = (load(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True))[
                "state_dict"
            ]
            return {name.removeprefix("model."): value for name, value in state.items()}
        return load_file(path)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, KeyError, EOFError, ValueError) as error:
        raise RunError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error


def load_sound(path: Path) -> dict[str, Tensor] | None:
    """As `load_state`, of a file that can be made again: None where there is none, and, with a warning, for a damaged
    one."""
    if not path.is_file():
        return None
    try:
        return load_state(path)
    except RunError as error:
        log.warning("%s; it is made again", error)
        return None


def state_hash(state: Mapping[str, Tensor]) -> str:
    """12 hexadecimal digits of the names and values of parameters."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode() + state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


class Journal:
    """Says what each step of the arc does, how long it took the last time, how long it took now, where its files are.

    times: seconds by step, kept in `path` over all runs on this machine, where it `keeps` them.
    """

    def __init__(self, path: Path, keeps: bool = True) -> None:
        self.path, self.keeps, self.seconds = path, keeps, dict[str, float]()

    @contextmanager
    def step(self, name: str, key: str, what: str, where: Path) -> Iterator[None]:
        """key: what the time depends on (the times of other keys say nothing about this step)."""
        known = (read_json(self.path) or {}).get(f"{name}/{key}")
        expect = f"about {known:.0f} s" if known is not None else "first time with these settings: no estimate yet"
        print(f"\n== {name}: {what} ({expect})\n   {where}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        if self.keeps:
            write_json(self.path, (read_json(self.path) or {}) | {f"{name}/{key}": round(self.seconds[name], 1)})
        print(f"   done in {self.seconds[name]:.1f} s", flush=True)
