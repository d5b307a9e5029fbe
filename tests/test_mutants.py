"""Are the campaigns strong enough? Each mutant breaks one promise, and its campaign has to say which."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import campaigns
import saves
import subjects
from symbiotic import claim, files
from symbiotic import fit as fitting
from symbiotic.callbacks import checkpoint as saving
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO

Patch = pytest.MonkeyPatch
Campaign = Callable[[Path, Path], dict[str, Any]]

CASE = ((*subjects.MEMORY, "data.micro_batches=1", "data.num_workers=0", "evaluation.every=0", "save_every=2"),)


def kills(shared: Path, folder: Path) -> dict[str, Any]:
    return campaigns.kills(CASE, 4, shared, folder, seed=3)


def damages(shared: Path, folder: Path) -> dict[str, Any]:
    return campaigns._campaign(CASE, 4, shared, folder, 3, 4, lambda rng: signal.SIGKILL, damaged=1.0)


def signals(shared: Path, folder: Path) -> dict[str, Any]:
    return campaigns.signals(((*CASE[0][:-1], "save_every=100"),), 3, shared, folder, seed=1)


def signals_to_workers(shared: Path, folder: Path) -> dict[str, Any]:
    case = (*subjects.MEMORY, "data.micro_batches=1", "data.num_workers=2", "evaluation.every=0", "save_every=100")
    return campaigns.signals((case,), 8, shared, folder, seed=1)


def lines(shared: Path, folder: Path) -> dict[str, Any]:
    return saves.saves_at_every_line(folder)


def writes(shared: Path, folder: Path) -> dict[str, Any]:
    return saves.saves(6, 20, folder)


def no_resume(patch: Patch) -> None:
    patch.setattr(fitting, "newest_valid", lambda folder: None)


def the_one_before(patch: Patch) -> None:
    """The oldest checkpoint that is kept is taken, not the newest."""
    patch.setattr(fitting, "newest_valid", lambda folder: next(iter(saving.checkpoints(folder)), None))


def data_from_the_start(patch: Patch) -> None:
    real = fitting.train_loader
    patch.setattr(fitting, "train_loader", lambda dataset, steps, start, *a, **k: real(dataset, steps, 0, *a, **k))


def moments_of_the_save_before(patch: Patch) -> None:
    """A checkpoint is written before the state of its optimiser: with that of the save before."""
    real, last = AtomicCheckpointIO.save_checkpoint, dict[str, Any]()

    def save(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        now = copy.deepcopy(checkpoint["optimizer_states"])
        real(self, {**checkpoint, "optimizer_states": last.get("states", now)}, path)
        last["states"] = now

    patch.setattr(AtomicCheckpointIO, "save_checkpoint", save)


def no_checkpoint_at_a_stop(patch: Patch) -> None:
    patch.setattr(saving, "due", lambda step, every, last, stopping: step == last or step % every == 0)


def no_checksum(patch: Patch) -> None:
    patch.setattr(saving, "uncommitted", lambda path: None if files.announced(path) else "no manifest")


def one_kept(patch: Patch) -> None:
    real = saving.superseded
    patch.setattr(saving, "superseded", lambda folder, keep: real(folder, 1))


def the_older_removed_first(patch: Patch) -> None:
    real = AtomicCheckpointIO.save_checkpoint

    def save_checkpoint(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        for old in saving.checkpoints(path.parent):
            self.remove_checkpoint(old)
        real(self, checkpoint, path)

    patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_checkpoint)


def the_manifest_first(patch: Patch) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        about = self.with_name(self.name.replace(".ckpt.", ".ckpt.json."))
        if about != self and about.exists():
            real(about, files.manifest_of(target))
        return real(self, target) if self.exists() else target

    patch.setattr(Path, "replace", replace)


def workers_end_first(patch: Patch) -> None:
    """A signal to all processes ends the workers of the loader, which the last step needs."""
    patch.setattr(fitting, "serve", claim.let_go)


def in_place(patch: Patch) -> None:
    """Under the final name from the first byte on."""

    def commit(path: Path, write: Any, *, need: int = 0, manifest: Any = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        files.write_json(
            files.manifest_of(path), {**manifest, "bytes": path.stat().st_size, "sha256": files.checksum(path)}
        )
        return path

    patch.setattr(saving, "commit", commit)


MUTANTS: dict[str, tuple[Callable[[Patch], None], Campaign, str]] = {
    "no resume": (no_resume, kills, r"it went on from step 0, not "),
    "the older checkpoint is taken": (the_one_before, kills, r"it went on from step \d+, not "),
    "the data begin anew": (data_from_the_start, kills, r"step \d+: batches differs"),
    "moments of the save before": (moments_of_the_save_before, kills, r"step \d+: moments differs"),
    "no checkpoint at a stop": (no_checkpoint_at_a_stop, signals, r"after SIG\w+ at step \d+ the newest checkpoint"),
    "workers end at a signal": (workers_end_first, signals_to_workers, r"exit status 1 after SIGTERM"),
    "no checksum is looked at": (no_checksum, damages, r"it went on from step \d+, not |exit status 1"),
    "written in place": (in_place, writes, r"unreadable: "),
    "one is kept": (one_kept, lines, r"only 1 checkpoints are sound"),
    "the older are removed first": (the_older_removed_first, lines, r"only [01] checkpoints are sound"),
}
QUICK: dict[str, tuple[Callable[[Patch], None], Campaign, str]] = {
    "the manifest is written first": (the_manifest_first, lines, r"step=000004\.ckpt\.json is of no sound file"),
}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS)])
def test_a_campaign_finds_its_mutant(
    name: str, shared_tmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, campaign, finding = (QUICK | MUTANTS)[name]
    with monkeypatch.context() as patch:
        mutate(patch)
        try:
            wrong = campaign(shared_tmp, tmp_path)["wrong"]
        except AssertionError as error:  # a run that cannot come to its end
            wrong = [str(error)]
    assert any(re.search(finding, line) for line in wrong), wrong
