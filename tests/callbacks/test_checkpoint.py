"""A checkpoint is whole or absent, a damaged one is passed over, and a resumed fit is the uninterrupted one."""

from __future__ import annotations

import logging
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from symbiotic.callbacks.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    StepCheckpoint,
    checkpoint_path,
    checkpoints,
    defect,
    due,
    newest_valid,
    num_bytes,
    step_of,
    sweep,
)
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.log import StepLog
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.progress import Progress
from symbiotic.callbacks.routing_monitor import RoutingMonitor

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}


def state(step: int, numbers: int = 500) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "weights": {"a": torch.randn(numbers, generator=generator), "b": torch.arange(7)}}


def write(folder: Path, *steps: int) -> list[Path]:
    for step in steps:
        AtomicCheckpointIO().save_checkpoint(state(step), checkpoint_path(folder, step))
    return checkpoints(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "new" / "folder", 7)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 7
    torch.testing.assert_close(loaded["weights"], state(7)["weights"], rtol=0, atol=0)
    assert names(path.parent) == ["step=000007.ckpt"]


def test_the_newest_is_the_largest_step_whatever_was_written_last(tmp_path: Path) -> None:
    write(tmp_path, 1_000_000, 30, 200)
    (tmp_path / "last.ckpt").write_bytes(b"not one of ours")
    assert [step_of(path) for path in checkpoints(tmp_path)] == [30, 200, 1_000_000]
    newest = newest_valid(tmp_path)
    assert newest is not None
    assert step_of(newest) == 1_000_000
    assert newest_valid(tmp_path / "absent") is None


def test_every_truncation_is_passed_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = write(tmp_path, 1, 2)
    data = new.read_bytes()
    for keep in [0, 1, 100, *np.linspace(200, len(data) - 1, 40, dtype=int).tolist()]:
        new.write_bytes(data[:keep])
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="symbiotic"):
            assert newest_valid(tmp_path) == old
        assert len(caplog.records) == 1
        assert str(new) in caplog.text
        with pytest.raises(CheckpointError, match=r"step=000002\.ckpt: corrupt"):
            AtomicCheckpointIO().load_checkpoint(new)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    """A flip in data, names or the archive's directory is refused; one in padding between members changes nothing."""
    (path,) = write(tmp_path, 3)
    data, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        place = rng.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        if defect(path) is not None:
            refused += 1
        else:
            loaded = AtomicCheckpointIO().load_checkpoint(path)
            torch.testing.assert_close(loaded["weights"], state(3)["weights"], rtol=0, atol=0)
    assert refused > 150


def test_every_flipped_bit_of_a_weight_is_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 3)
    data, weights = path.read_bytes(), state(3)["weights"]["a"].numpy().tobytes()
    start, rng = data.index(weights), random.Random(1)
    for _ in range(100):
        place = rng.randrange(8 * len(weights))
        flipped = bytearray(data)
        flipped[start + place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert newest_valid(tmp_path) is None


def test_only_litter_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".step=000002.ckpt.writing").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert [path.name for path in sweep(tmp_path)] == [".step=000002.ckpt.writing"]
    assert names(tmp_path) == ["notes.txt", "step=000001.ckpt"]
    assert newest_valid(tmp_path) == checkpoint_path(tmp_path, 1)


KILLS = """
import os, random, signal, sys, time, torch
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO, checkpoint_path, checkpoints, defect, sweep

def write(folder, weights):
    for step in range(1, 100_000):
        AtomicCheckpointIO().save_checkpoint({"step": step, "w": weights * step}, checkpoint_path(folder, step % 3))

folder, rng, weights, litter = sys.argv[1], random.Random(2), torch.ones(1_000_000), 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        write(folder, weights)
    time.sleep(0.1 + 0.1 * rng.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in checkpoints(folder):
        assert defect(path) is None, path
        loaded = AtomicCheckpointIO().load_checkpoint(path)
        assert (loaded["w"] == loaded["step"]).all(), path
    litter += len(sweep(folder))
print(len(checkpoints(folder)), litter)
"""


def test_a_kill_at_any_moment_leaves_only_whole_files(tmp_path: Path) -> None:
    """20 SIGKILLs of a process that does nothing but write checkpoints of 4 MB."""
    ran = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], stdout=subprocess.PIPE, check=True, env=ENVIRONMENT
    )
    files, litter = map(int, ran.stdout.split())
    assert files == 3
    assert litter > 0  # else no kill hit a write
    assert len(names(tmp_path)) == 3


def test_a_write_that_fails_leaves_no_part_and_names_the_file(tmp_path: Path) -> None:
    (old,) = write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # files end here, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"step=000002\.ckpt: checkpoint not written: ") as caught:
            AtomicCheckpointIO().save_checkpoint(state(2, 1_000_000), checkpoint_path(tmp_path, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [old.name]
    assert defect(old) is None


def test_a_folder_without_write_permission_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file where the folder should be: no permission helps, not even that of root
    with pytest.raises(CheckpointError, match="checkpoint not written: ") as caught:
        AtomicCheckpointIO().save_checkpoint(state(1), checkpoint_path(blocked / "checkpoints", 1))
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent")


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


def test_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint_path(tmp_path, 1)
    torch.save({"weights": Evil()}, path)
    with pytest.raises(Exception, match=r"corrupt checkpoint .*[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "executed").exists()


def test_size_of_nested_state() -> None:
    assert num_bytes({"a": [torch.zeros(3), (torch.zeros(2, dtype=torch.int64), "x")], "b": 1}) == 12 + 16


@pytest.mark.parametrize(
    ("step", "every", "last", "stopping", "expected"),
    [
        (4, 2, 9, False, True),
        (5, 2, 9, False, False),
        (9, 2, 9, False, True),
        (5, 2, 9, True, True),
        (4, 0, 9, False, False),
    ],
)
def test_due(step: int, every: int, last: int, stopping: bool, expected: bool) -> None:
    assert due(step, every, last, stopping) is expected


# --------------------------------------------------------------------------- in a fit


def callbacks(folder: Path, every: int = 2) -> list[Any]:
    monitors = [StepLog(every=2), GradientShielding(), LRPhases(), RoutingMonitor(every=2), Progress(every=2)]
    return [*monitors, StepCheckpoint(str(folder), every=every)]


def test_two_are_kept_and_the_last_step_is_saved(fit: Any, tmp_path: Path) -> None:
    fit(callbacks(tmp_path / "c"), steps=7)
    assert names(tmp_path / "c") == ["step=000006.ckpt", "step=000007.ckpt"]


def test_state_is_plain(fit: Any, tmp_path: Path) -> None:
    fit(callbacks(tmp_path / "c", every=1), steps=3, micro_batches=2)
    loaded = torch.load(checkpoint_path(tmp_path / "c", 3), weights_only=True)
    assert loaded["global_step"] == 3
    assert set(loaded["window/step_log"]) >= {"loss", "tokens"}
    assert set(loaded["window/routing_monitor"]) == {"counts", "tokens", "capacity", "micro_batches", "random"}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_resumed_fit_ends_with_the_same_bits(fit: Any, tmp_path: Path, micro_batches: int) -> None:
    whole, end = fit(callbacks(tmp_path / "whole"), steps=6, micro_batches=micro_batches)
    fit(callbacks(tmp_path / "c", every=3), steps=6, micro_batches=micro_batches, stop=3)
    found = newest_valid(tmp_path / "c")
    trainer, resumed = fit(callbacks(tmp_path / "c"), steps=6, micro_batches=micro_batches, ckpt_path=found)
    assert trainer.global_step == whole.global_step == 6
    expected = end.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    one, other = (torch.load(checkpoint_path(tmp_path / n, 6), weights_only=True) for n in ("whole", "c"))
    moments, expected_moments = one["optimizer_states"][0]["state"], other["optimizer_states"][0]["state"]
    torch.testing.assert_close(moments, expected_moments, rtol=0, atol=0)


def test_nothing_is_saved_in_the_middle_of_an_accumulation_after_a_resume(fit: Any, tmp_path: Path) -> None:
    """The trap: global_step is a multiple of `every` for every micro-batch up to the next optimiser step."""
    folder = tmp_path / "c"
    fit(callbacks(folder), steps=6, micro_batches=3, stop=2)
    before = (folder / "step=000002.ckpt").stat().st_mtime_ns
    fit(callbacks(folder), steps=6, micro_batches=3, stop=3, ckpt_path=newest_valid(folder))
    assert (folder / "step=000002.ckpt").stat().st_mtime_ns == before
    batches = torch.load(folder / "step=000003.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert batches["epoch_loop.batch_progress"]["total"]["ready"] == 9


def test_a_finished_fit_that_is_started_again_trains_nothing(fit: Any, tmp_path: Path) -> None:
    _, end = fit(callbacks(tmp_path / "c"), steps=4)
    trainer, again = fit(callbacks(tmp_path / "c"), steps=4, ckpt_path=newest_valid(tmp_path / "c"))
    assert trainer.global_step == 4
    assert all(torch.equal(v, end.state_dict()[n]) for n, v in again.state_dict().items())


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(fit: Any, tmp_path: Path) -> None:
    _, end = fit(callbacks(tmp_path / "whole"), steps=6)
    fit(callbacks(tmp_path / "c"), steps=6, stop=4)
    damaged = checkpoint_path(tmp_path / "c", 4)
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    found = newest_valid(tmp_path / "c")
    assert found == checkpoint_path(tmp_path / "c", 2)
    _, resumed = fit(callbacks(tmp_path / "c"), steps=6, ckpt_path=found)
    assert all(torch.equal(v, end.state_dict()[n]) for n, v in resumed.state_dict().items())
    assert defect(damaged) is None  # written again
