"""Where a fit begins: at the newest sound checkpoint, which is the run's own, and it ends where its own steps end."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from subjects import BASE, STEPS, Subject, starts
from symbiotic.arc import RECEIPT, Arc
from symbiotic.callbacks.checkpoint import checkpoint_path, committed, defect
from symbiotic.callbacks.step import StepCallback
from symbiotic.config import compose
from symbiotic.files import manifest_of, read_json
from symbiotic.fit import start_of
from symbiotic.resume import CHANGES, SETTINGS, hold, identities, identity, settings
from symbiotic.schema import RunError
from symbiotic.stop import Stopped

PLAIN = ("evaluation.every=0", "save_every=4", "data.micro_batches=1", "callbacks.gradient_conflict=null")


@pytest.fixture(scope="module")
def subject(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(PLAIN, shared_tmp, tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module")
def done(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended: checkpoints of steps 12 and 16."""
    folder = tmp_path_factory.mktemp("done")
    subject.train(folder)
    return folder


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class StopAt(StepCallback):
    """A rank's own end: nothing asked this process for it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, pl_module: Any, step: int) -> None:
        trainer.should_stop = step == self.step


class SignalAt(StepCallback):
    """The signal comes in a hook of Lightning's, before the loop has begun."""

    def __init__(self, hook: str, number: int) -> None:
        setattr(self, hook, lambda *_: signal.raise_signal(number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_signal_while_the_fit_is_set_up_ends_it_after_one_step(
    hook: str, number: int, subject: Subject, tmp_path: Path
) -> None:
    """Lightning's own handler is in force by then, and would end the fit with an error and without a checkpoint."""
    with pytest.raises(Stopped) as caught:
        subject.train(tmp_path, more=[SignalAt(hook, number)])
    assert caught.value.status == 128 + number
    assert [path.name for path in committed(tmp_path / "checkpoints")] == ["step=000001.ckpt"]


@pytest.mark.parametrize("damage", ["bytes", "manifest", "none"])
def test_a_step_that_only_a_damaged_checkpoint_has_was_not_reached(
    damage: str, subject: Subject, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last checkpoint is damaged, or its manifest is, or was never written: the run goes on from the one before it,
    says why, and one that ends before the last step has not reached it."""
    last = checkpoint_path(run / "checkpoints", STEPS)
    if damage == "bytes":
        flip(last)
    elif damage == "manifest":
        manifest_of(last).write_text('{"bytes": ')
    else:
        manifest_of(last).unlink()
    with pytest.raises(Stopped) as caught:
        subject.train(run, more=[StopAt(14)])
    assert caught.value.status == 128 + signal.SIGTERM
    (warned,) = [line for line in caplog.messages if "skipping the corrupt checkpoint" in line]
    assert str(last) in warned
    assert starts(run) == [0, 12]
    assert [path.name for path in committed(run / "checkpoints")] == ["step=000012.ckpt", "step=000014.ckpt"]
    subject.train(run)
    assert starts(run) == [0, 12, 14]
    assert defect(last) is None


@pytest.mark.parametrize(("key", "change"), [("settings", "rates.lr=1e-3"), ("settings", "seed=1")])
def test_the_checkpoint_of_another_run_is_refused(key: str, change: str, subject: Subject, run: Path) -> None:
    """The way of a wrong `cp`: it is newer than the run's own, sound, and of the same shape."""
    about = subject.arc.about()
    made = {"code": "", "torch": "", "numpy": "", "lightning": ""}
    other = identity(settings(compose([*BASE, *PLAIN, change]), made, about["data"]))
    assert other[key] != about[key]
    line = rf"step=000016\.ckpt: another run's checkpoint: its {key} are {about[key]}, this run's "
    with pytest.raises(RunError, match=line) as one:
        start_of(run / "checkpoints", other, ())
    assert "\n" not in str(one.value)
    with pytest.raises(RunError, match=r"its data are .*, this run's f00d; remove it"):
        start_of(run / "checkpoints", about | {"data": "f00d"}, ())
    assert start_of(run / "checkpoints", other, [about["settings"]]) is not None


def test_what_changes_no_result_changes_no_identity(subject: Subject) -> None:
    made = {"code": "a", "torch": "b", "numpy": "c", "lightning": "d"}
    free = ("data.num_workers=2", "save_every=1", "threads=2", "paths.cache=/elsewhere")
    one, other = (settings(compose([*BASE, *PLAIN, *more]), made, "f00d") for more in ((), free))
    assert identity(one) == identity(other | {"torch": "another version"})


def test_a_recorded_change_lets_the_checkpoints_from_before_it_through(tmp_path: Path) -> None:
    made = {"code": "a", "torch": "b", "numpy": "c", "lightning": "d"}
    steps = (("seed=0",), ("seed=1",), ("seed=1", "callbacks.routing_heatmap=null"))
    had = [settings(compose([*BASE, *more]), made, "f00d") for more in steps]
    hold(tmp_path, had[0], (), begun=False, step=lambda: 0)
    hold(tmp_path, had[1], ("seed",), begun=True, step=lambda: 4)
    hold(tmp_path, had[2], ("seed", "callbacks"), begun=True, step=lambda: 8)
    assert identities(tmp_path) >= {value for one in had for value in identity(one).values()}
    (tmp_path / CHANGES).write_text("[{")
    with pytest.raises(RunError, match=r"changes\.json: damaged, so that nobody knows"):
        identities(tmp_path)


@pytest.mark.parametrize("damage", ["{", None])
def test_a_run_without_a_sound_receipt_is_still_held_to_its_settings(
    damage: str | None, subject: Subject, run: Path
) -> None:
    """Its checkpoints say that it has begun."""
    began = settings(subject.arc.config, subject.arc.provenance, subject.arc.fingerprint)
    hold(run, began, (), begun=False, step=lambda: 0)
    if damage is not None:
        (run / RECEIPT).write_text(damage)
    overrides = [*BASE, *PLAIN, f"run_dir={run}", f"paths.data={subject.arc.config.paths.data}", "seed=3"]
    arc = Arc(compose([*overrides, f"paths.cache={subject.arc.config.paths.cache}"]))
    with pytest.raises(RunError, match=r"this run began otherwise: seed 0 -> 3; "):
        arc.hold()
    (run / SETTINGS).write_text("{")
    with pytest.raises(
        RunError, match=r"its settings\.json is damaged, and no checkpoint says .*; start it as it began"
    ):
        arc.hold()


def test_checkpoints_vouch_for_settings_that_were_lost(subject: Subject, run: Path) -> None:
    arc = copy.copy(subject.arc)
    arc.folder = run
    arc.config = dataclasses.replace(arc.config, run_dir=str(run))
    for damage in ("{", None):
        (run / SETTINGS).unlink(missing_ok=True)
        if damage is not None:
            (run / SETTINGS).write_text(damage)
        arc.hold()
        assert read_json(run / SETTINGS) == settings(arc.config, arc.provenance, arc.fingerprint)
    (run / SETTINGS).write_text("{")
    arc.provenance = {**arc.provenance, "torch": "0.1"}
    with pytest.raises(RunError, match=r"its settings\.json is damaged, and no checkpoint says"):
        arc.hold()
