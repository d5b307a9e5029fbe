"""One process a run folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import intruders
from campaigns import left_behind
from symbiotic.claim import claimed, let_go, owner
from symbiotic.schema import RunError


def hold(folder: Path, told: Connection) -> None:
    with claimed(folder, "train there"):
        told.send("held")
        signal.pause()


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
    found = intruders.simultaneous(50, tmp_path)
    assert found["wrong"] == []
    assert (found["winners"], found["refused"]) == (1, 49)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"file/run: cannot be written: Not a directory"),
        claimed(tmp_path / "file/run", "go"),
    ):
        raise AssertionError("made")


def test_a_worker_that_outlives_its_killed_process_holds_nothing(tmp_path: Path) -> None:
    """As those of a loader do for some seconds; other forked processes, as ranks, hold it on."""
    for lets_go in (True, False):
        folder = tmp_path / str(lets_go)
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            with claimed(folder, "work"):
                worker = os.fork()
                if not worker and lets_go:
                    let_go()
                os.write(writing, b"w" if worker else b"c")
                signal.pause()
        assert sorted(os.read(reading, 1) for _ in range(2)) == [b"c", b"w"]
        (worker,) = children(process)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert (owner(folder) is None) == lets_go
        os.kill(worker, signal.SIGKILL)


ORPHAN = """
import multiprocessing, os, time
from symbiotic.claim import serve

def work():
    print(os.getpid(), flush=True)
    time.sleep({before})
    serve()
    print("serves", flush=True)
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
time.sleep(60)
"""


@pytest.mark.parametrize("before", [0.0, 0.5])
def test_a_worker_ends_with_its_process_also_where_that_died_before_it_began(before: float) -> None:
    command = [sys.executable, "-c", ORPHAN.format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        if not before:
            assert process.stdout.readline() == "serves\n"
        process.kill()
        assert process.stdout.read() == ""  # to the end: the worker has closed it, too, and never served
    assert left_behind([worker]) == []


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
