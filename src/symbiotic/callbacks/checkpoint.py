"""Checkpoints that are whole or absent: written beside their target, fsynced, renamed; the newest valid one is found.

Lightning's own write is atomic only when $TMPDIR is on the same file system, and its `ckpt_path="last"` does not
validate (spec: reliability.md 1.1, 1.2). Its ModelCheckpoint saves in the middle of an accumulation window right after
a resume, and tracks what to delete in its own state; `StepCheckpoint` looks at the folder instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from symbiotic.callbacks.step import StepCallback

log = logging.getLogger(__name__)

_NAME = re.compile(r"^step=(\d+)\.ckpt$")
_TEMPORARY = ".writing"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read. The message is one line with the path."""


def checkpoint_path(folder: Path | str, step: int) -> Path:
    """`step=000450.ckpt`: names sort like steps up to a million of them; the number is what counts."""
    return Path(folder) / f"step={step:06d}.ckpt"


def step_of(path: Path) -> int:
    """The optimiser step of a checkpoint file; -1 for any other name."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else -1


def checkpoints(folder: Path | str) -> list[Path]:
    """Checkpoint files of a folder, oldest first; empty when there is no such folder."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=step_of)


def defect(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None. Reads the whole file: its CRC-32 finds any flipped bit of data, and
    torch has to find its way through it (the two readers do not check the same headers)."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"checksum of {bad} is wrong"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes raise nearly anything
        return (str(error).splitlines() or [type(error).__name__])[0][:160]
    return None


def newest_valid(folder: Path | str) -> Path | None:
    """The checkpoint of the latest step that passes its checksums; a newer one that does not is named in a warning."""
    for path in reversed(checkpoints(folder)):
        problem = defect(path)
        if problem is None:
            return path
        log.warning("skipping the corrupt checkpoint %s (%s)", path, problem)
    return None


def sweep(folder: Path | str) -> list[Path]:
    """Remove what writes left behind that were killed; call it before training. Returns what was removed."""
    folder = Path(folder)
    litter = sorted(folder.glob(f".*{_TEMPORARY}")) if folder.is_dir() else []
    for path in litter:
        path.unlink(missing_ok=True)
    return litter


class AtomicCheckpointIO(CheckpointIO):
    """`Trainer(plugins=[AtomicCheckpointIO()])`: a file under its final name is complete, whenever the process dies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises:
        CheckpointError: the file could not be written, for one a full disk. No part of it is left.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}{_TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, str(temporary))
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: checkpoint not written: {_reason(error, checkpoint, path)}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Plain containers and tensors only (`weights_only=True`, whatever is asked), onto the CPU by default.

        Raises:
            CheckpointError: no such file, or a corrupt one.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such checkpoint")
        problem = defect(path)
        if problem:
            raise CheckpointError(f"{path}: corrupt checkpoint ({problem})")
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested plain containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(num_bytes(v) for v in value.values())
    return sum(num_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def _reason(error: Exception, checkpoint: Any, path: Path) -> str:
    folder = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    need, have = num_bytes(checkpoint) / 2**20, shutil.disk_usage(folder).free / 2**20
    full = have < 1.1 * need + 1
    return f"need {need:.0f} MB, have {have:.0f} MB" if full else str(error).splitlines()[0]


class StepCheckpoint(StepCallback, Checkpoint):
    """Saves `<folder>/step=NNNNNN.ckpt` every `every` optimiser steps, at the last step, and when a stop was asked for.

    Only right after an optimiser step, so on accumulation boundaries. Keeps the newest `keep` files. Has no state.
    Lightning runs it after all other callbacks.
    """

    def __init__(self, folder: str, every: int, keep: int = 2) -> None:
        self.folder, self.every, self.keep = Path(folder), every, keep

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            sweep(self.folder)

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if due(step, self.every, trainer.max_steps, trainer.should_stop):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
        if trainer.is_global_zero:
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink(missing_ok=True)


def due(step: int, every: int, last: int, stopping: bool) -> bool:
    """Is a checkpoint due after `step` finished optimiser steps? every=0: only at the end."""
    return stopping or step == last or (every > 0 and step % every == 0)
