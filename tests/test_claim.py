"""One process a run folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from symbiotic.claim import claimed
from symbiotic.schema import RunError


def hold(folder: Path, told: Connection) -> None:
    with claimed(folder, "train there"):
        told.send("held")
        signal.pause()


def race(folder: Path, barrier: object, told: Connection) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        with claimed(folder, "train there"):
            told.send("won")
            signal.pause()
    except RunError:
        told.send("refused")


def test_a_second_process_is_refused_by_name_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    owner = context.Process(target=hold, args=(tmp_path, there))
    owner.start()
    assert here.recv() == "held"
    with (
        pytest.raises(RunError, match=rf"process {owner.pid} on \S+ is at work in this folder"),
        claimed(tmp_path, "go"),
    ):
        raise AssertionError("two owners")
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    with claimed(tmp_path, "go"):
        assert f"process {os.getpid()}" in (tmp_path / ".claim").read_text()
    with claimed(tmp_path, "go again"):
        pass


def test_of_many_simultaneous_starts_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, pipes, started = context.Barrier(12), [], []
    for _ in range(12):
        here, there = context.Pipe()
        started.append(context.Process(target=race, args=(tmp_path, barrier, there)))
        started[-1].start()
        pipes.append(here)
    answers = [pipe.recv() for pipe in pipes]
    for process in started:
        process.kill()
        process.join()
    assert sorted(set(answers)) == ["refused", "won"]
    assert answers.count("won") == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"file/run: cannot be written: Not a directory"),
        claimed(tmp_path / "file/run", "go"),
    ):
        raise AssertionError("made")
