"""Campaigns against checkpoints alone: kills in a save, at random and at every line of it; flips and cuts of a file."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from crash import every_line
from subjects import MEMORY, Subject, ended, kill, newest_sound, readable, sound_steps
from symbiotic.callbacks import checkpoint as saving
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO, checkpoint_path, checkpoints, newest_valid
from symbiotic.files import WRITING, sweep

KEPT = 2  # complete checkpoints


def saves(count: int, megabytes: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """R2: SIGKILLs of a process that does nothing but write checkpoints of this size, as a run does: step after step
    from the newest sound one on, with TMPDIR elsewhere."""
    rng, wrong, litter, start = random.Random(seed), list[str](), 0, time.monotonic()
    weights = torch.arange(megabytes * 2**18, dtype=torch.float32)
    told, saved = folder / "told", folder / "checkpoints"
    saved.mkdir(parents=True)
    for _ in range(count):
        process = os.fork()
        if not process:
            os.environ["TMPDIR"] = "/dev/shm"
            while True:
                save_next(saved, weights, told)
        time.sleep(rng.uniform(0.0, 0.02 * megabytes + 0.1))
        kill([process], signal.SIGKILL)
        ended(process)
        wrong += unsafe(saved, told)
        litter += len(sweep(folder))
        wrong += [f"litter: {path.name}" for path in saved.glob(f".*{WRITING}")]
    facts = {"hits": count, "in a write": litter, "saves": newest_sound(saved)}
    return {**facts, "wrong": wrong, "seconds": time.monotonic() - start}


def save_next(folder: Path, weights: torch.Tensor, told: Path) -> None:
    """Write the checkpoint behind the newest sound one, tell, and remove what is superseded: as `StepCheckpoint`."""
    step, io = saving.newest_step(folder) + 1, AtomicCheckpointIO()
    io.save_checkpoint({"global_step": step, "state_dict": {"w": weights}}, checkpoint_path(folder, step))
    told.write_text(str(step))
    for old in saving.superseded(folder, KEPT):
        io.remove_checkpoint(old)


def unsafe(folder: Path, told: Path) -> list[str]:
    """What a kill in a save may not leave. Every save that came to its end is there, and the one before it: a step is
    written over only where it is not sound. One file at most has no manifest, and no manifest is without its file."""
    found, sound = checkpoints(folder), sound_steps(folder)
    step, newest = int((told.read_text() if told.exists() else "") or 0), max(sound, default=0)
    wrong = [f"unreadable: {path.name}" for path in found if not readable(path)]
    if newest < step:
        wrong.append(f"step {step} was saved, the newest sound one is {newest}")
    if len(sound) < min(KEPT, newest):
        wrong.append(f"only {len(sound)} checkpoints are sound after step {newest}")
    if len(found) - len(sound) > 1:
        wrong.append(f"{len(found) - len(sound)} checkpoints are not sound")
    manifests = [path for path in folder.glob("*.ckpt.json") if saving.step_of(path.with_suffix("")) not in sound]
    return wrong + [f"{path.name} is of no sound file" for path in manifests]


def saves_at_every_line(folder: Path) -> dict[str, Any]:
    """R2: a kill before each line of a save and of the removal of what it supersedes, in turn; and again where the
    step's file is there already, without a manifest, as an earlier kill left it."""
    wrong, start, points = list[str](), time.monotonic(), 0
    names = ("commit", "replace", "save_checkpoint", "superseded", "remove_checkpoint")
    weights, base, work, told = torch.arange(1000.0), folder / "base", folder / "work", folder / "told"
    for _ in range(KEPT + 1):
        save_next(base, weights, told)

    def before() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base, work)
        told.write_text(str(KEPT + 1))

    for left_over in (False, True):
        if left_over:
            shutil.copy(checkpoint_path(base, KEPT + 1), checkpoint_path(base, KEPT + 2))
        for point in every_line(lambda: save_next(work, weights, told), names, before):
            points += 1
            sweep(work)
            wrong += [f"line {point}: {line}" for line in unsafe(work, told)]
    return {"hits": points, "wrong": wrong, "seconds": time.monotonic() - start}


def mutations(flips: int, cuts: int, shared: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """R3: bit flips and truncations anywhere in the newest checkpoint of a run."""
    rng, wrong, start = random.Random(seed), [], time.monotonic()
    subject = Subject((*MEMORY, "save_every=8", "evaluation.every=0"), shared, folder)
    subject.whole(folder / "run")
    old, new = checkpoints(folder / "run" / "checkpoints")
    whole = new.read_bytes()
    for n in range(flips + cuts):
        if n < flips:
            bit = rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
        else:
            damaged = bytearray(whole[: rng.randrange(len(whole))])
        new.write_bytes(damaged)
        found = newest_valid(new.parent)
        wrong += [] if found == old else [f"mutation {n}: {found} was taken"]
    new.write_bytes(whole)
    wrong += [] if newest_valid(new.parent) == new else ["the undamaged file is refused"]
    return {"hits": flips + cuts, "bytes": len(whole), "wrong": wrong, "seconds": time.monotonic() - start}
