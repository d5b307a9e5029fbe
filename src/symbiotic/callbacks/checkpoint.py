"""Checkpoints that are whole or absent: committed with a manifest, checked before they are read; the newest valid wins.

Lightning's own write is atomic only when $TMPDIR is on the same file system, and its `ckpt_path="last"` does not
validate (spec: reliability.md 1.1, 1.2). Its ModelCheckpoint saves in the middle of an accumulation window right after
a resume, and tracks what to delete in its own state; `StepCheckpoint` looks at the folder instead.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from symbiotic.callbacks.sharded_checkpoint import REST, load
from symbiotic.callbacks.step import StepCallback
from symbiotic.files import announced, commit, read_manifest, remove, uncommitted
from symbiotic.training.finite import lost_values
from symbiotic.training.optimizer_state import numbered

log = logging.getLogger(__name__)

_NAME = re.compile(r"^step=(\d+)\.ckpt$")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read. The message is one line with the path."""


def checkpoint_path(folder: Path | str, step: int) -> Path:
    """`step=000450.ckpt`: names sort like steps up to a million of them; the number is what counts."""
    return Path(folder) / f"step={step:06d}.ckpt"


def step_of(path: Path) -> int:
    """The optimiser step of a checkpoint, a file or a folder of parts; -1 for any other name."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else -1


def checkpoints(folder: Path | str) -> list[Path]:
    """Checkpoints of a folder, oldest first; empty when there is no such folder."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=step_of)


def committed(folder: Path | str) -> list[Path]:
    """Those whose writing came to an end, oldest first, by what their manifests say; their bytes are not read."""
    return [path for path in checkpoints(folder) if announced(path)]


def defect(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None. Every byte is held against the manifest, and torch has to find its
    way through it without running anything."""
    problem = uncommitted(path)
    if problem is not None:
        return problem
    try:
        torch.load(path / REST if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file with a manifest of its own raises nearly anything
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


def newest_step(folder: Path | str) -> int:
    """The optimiser step that a fit in this folder goes on from; 0 where it begins."""
    newest = newest_valid(folder)
    return step_of(newest) if newest else 0


def newest_manifest(folder: Path | str) -> dict[str, Any]:
    """What the manifest of `newest_valid` says; nothing where there is none."""
    newest = newest_valid(folder)
    return read_manifest(newest) if newest else {}


class AtomicCheckpointIO(CheckpointIO):
    """`Trainer(plugins=[AtomicCheckpointIO()])`: a file under its final name is complete, whenever the process dies.

    about: what every manifest says of the run, beside the step and the file's checksum.
    """

    def __init__(self, about: Mapping[str, str] | None = None) -> None:
        self.about = dict(about or {})

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises:
        CheckpointError: the file could not be written, for one a full disk, or holds a weight or a moment that is not
            finite. No part of it is left.
        """
        path = Path(path)
        if lost := lost_values(checkpoint):
            way = (
                "the newest checkpoint before it is sound; callbacks.finite_check finds such a step before it is taken"
            )
            raise CheckpointError(f"{path}: checkpoint not written: {lost} is not finite; {way}")
        manifest = {"step": checkpoint.get("global_step"), **self.about}
        try:
            commit(path, lambda p: save(checkpoint, p), need=num_bytes(checkpoint), manifest=manifest)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: checkpoint not written: {_reason(error, checkpoint, path)}") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Plain containers and tensors only (`weights_only=True`, whatever is asked), onto the CPU by default.

        Raises:
            CheckpointError: no such file, or a corrupt one.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
        problem = defect(path)
        if problem:
            raise CheckpointError(f"{path}: corrupt checkpoint ({problem})")
        return read(path, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """The manifest goes first: what is left when a kill comes between is no checkpoint."""
        remove(Path(path))


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint as one process saves it, also where many ranks saved it: whole tensors, the state of an optimiser by
    the numbers of its parameters."""
    if path.is_file():
        return torch.load(path, map_location=map_location, weights_only=True)
    checkpoint = load(path)
    return {**checkpoint, "optimizer_states": [numbered(state) for state in checkpoint["optimizer_states"]]}


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """`torch.save` without the CRC-32 of every tensor, which takes most of its time and which `torch.load` does not
    look at: the manifest has a checksum of all bytes. Programs that unzip the file may warn."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, str(path))
    finally:
        torch.serialization.set_crc32_options(before)


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
    full = have < 1.1 * need + 1  # torch does not say why a write failed
    return f"need {need:.0f} MB, have {have:.0f} MB" if full else str(error).splitlines()[0]


class StepCheckpoint(StepCallback, Checkpoint):
    """Saves `<folder>/step=NNNNNN.ckpt` every `every` optimiser steps, at the last step, and when a stop was asked for.

    Only right after an optimiser step, so on accumulation boundaries. Keeps the newest `keep` files. Has no state.
    Lightning runs it after all other callbacks.
    """

    def __init__(self, folder: str, every: int, keep: int = 2) -> None:
        self.folder, self.every, self.keep = Path(folder), every, keep

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if due(step, self.every, trainer.max_steps, trainer.should_stop):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
        if trainer.is_global_zero:
            for old in superseded(self.folder, self.keep):
                trainer.strategy.remove_checkpoint(old)


def superseded(folder: Path, keep: int) -> list[Path]:
    """Checkpoints older than the newest `keep` whose writing came to an end."""
    complete = committed(folder)
    older = (path for path in checkpoints(folder) if step_of(path) < step_of(complete[-keep]))
    return list(older) if len(complete) >= keep else []


def due(step: int, every: int, last: int, stopping: bool) -> bool:
    """Is a checkpoint due after `step` finished optimiser steps? every=0: only at the end."""
    return stopping or step == last or (every > 0 and step % every == 0)
