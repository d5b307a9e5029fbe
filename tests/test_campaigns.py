"""Short forms of the campaigns of `campaigns.py`; the long ones are `torture.py`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import campaigns
import saves
import subjects
from crash import at_file
from symbiotic.callbacks.checkpoint import committed, step_of
from symbiotic.claim import owner

FEW = (
    (*subjects.MEMORY, "data.micro_batches=3", "data.num_workers=2", "evaluation.every=0", "save_every=1"),
    (*subjects.MEMORY, "data.micro_batches=1", "data.num_workers=0", "evaluation.every=0", "save_every=7"),
)
EVALUATED = ((*subjects.MEMORY, "data.micro_batches=1", "data.num_workers=2", "evaluation.every=5", "save_every=8"),)
CAMPAIGNS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "20 kills": lambda shared, folder: campaigns.kills(FEW, 20, shared, folder, times=5),
    "4 signals": lambda shared, folder: campaigns.signals(EVALUATED, 4, shared, folder, seed=1),
    "10 kills in a save": lambda shared, folder: saves.saves(10, 20, folder),
    "a kill at every line of a save": lambda shared, folder: saves.saves_at_every_line(folder),
    "two ranks": lambda shared, folder: campaigns.ranks(4, shared, folder),
    "another number of ranks": lambda shared, folder: campaigns.elastic(shared, folder),
}


SLOW: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "8 kills in whole runs": lambda shared, folder: campaigns.wholes(4, shared, folder),
    "8 signals in whole runs": lambda shared, folder: campaigns.wholes(4, shared, folder, 1, signal.SIGTERM),
    "8 kills, and newest checkpoints damaged": lambda shared, folder: campaigns.damages(FEW, 8, shared, folder),
}


@pytest.mark.parametrize("name", [*CAMPAIGNS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_nothing_is_lost(name: str, shared_tmp: Path, tmp_path: Path) -> None:
    found = (CAMPAIGNS | SLOW)[name](shared_tmp, tmp_path)
    assert found["wrong"] == []
    assert found["hits"] >= 2


def test_a_signal_before_the_training_ends_cleanly_and_the_next_start_goes_on(shared_tmp: Path, tmp_path: Path) -> None:
    """While the corpus is looked up, in stage 0, at its anchor, in the split: status 143 and one line each time."""
    subject, run = subjects.WholeRun(shared_tmp), tmp_path / "run"
    moments = ("seconds.json", "checkpoints/.step=000002", "scores-", ".init.safetensors", ".receipt.json")
    for moment in moments:
        status = subjects.ended(subject.start(run, at_file(1, [moment], signal.SIGTERM)))
        assert status == 128 + signal.SIGTERM, subjects.said(run)
        last = (run / "output.txt").read_text().splitlines()[-1]
        assert last == "stopped by SIGTERM; the same command goes on from the newest checkpoint"
        assert owner(run) is None
        if "step=" in moment:
            (parent,) = (run / "cache" / "stage0").iterdir()
            assert [step_of(path) for path in committed(parent / "checkpoints")] == [2, 3]
    subject.whole(run)
    assert (run / "summary.json").is_file()
    assert "Traceback" not in (run / "output.txt").read_text()
