"""Files around a run: whole or absent, readable or refused in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from symbiotic import files, runs
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO, CheckpointError, defect
from symbiotic.callbacks.csv_log import CSVLog, read_rows
from symbiotic.callbacks.events import read_events, record_event
from symbiotic.callbacks.in_loop_evaluation import read_scores, record_scores
from symbiotic.launch import one_line
from symbiotic.runs import (
    Journal,
    commit,
    digest,
    load_state,
    read_json,
    run_code,
    save_state,
    source_hash,
    write_json,
)
from symbiotic.schema import RunError
from symbiotic.training.finite import not_finite


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"old": 1})

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        commit(path, broken)
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_between_a_file_and_its_manifest_leaves_no_manifest_of_an_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_state(tmp_path / "x.safetensors", {"a": torch.zeros(3)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    renamed = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: killed() if b == files.manifest_of(path) else renamed(a, b))
    with pytest.raises(KeyboardInterrupt):
        save_state(path, {"a": torch.ones(3)})
    assert not files.manifest_of(path).exists()
    assert load_state(path)["a"].tolist() == [1, 1, 1]


def test_only_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "deep").mkdir()
    dead, alive, mine = (f".a.ckpt.{pid}.writing" for pid in (process.pid, os.getppid(), os.getpid()))
    for name in (dead, alive, "a.ckpt", ".hidden"):
        (tmp_path / "deep" / name).write_text("half")
    assert [path.name for path in files.sweep(tmp_path)] == [dead]
    (tmp_path / mine).write_text("of a write that an exception ended")
    assert [path.name for path in files.sweep(tmp_path)] == [mine]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [alive, ".hidden", "a.ckpt"]
    assert files.sweep(tmp_path / "nowhere") == []


def test_states_round_trip_and_bad_ones_are_named(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(2, 5).T}
    loaded = load_state(save_state(tmp_path / "x.safetensors", state, data="f"))
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(RunError, match=r"none\.safetensors: no such checkpoint"):
        load_state(tmp_path / "none.safetensors")
    for name in ("bad.safetensors", "bad.ckpt"):
        (tmp_path / name).write_bytes(b"not a checkpoint at all")
        with pytest.raises(RunError, match=rf"{name}: not a readable checkpoint"):
            load_state(tmp_path / name)


def test_a_damaged_state_is_refused_and_one_without_a_manifest_is_taken(tmp_path: Path) -> None:
    path = save_state(tmp_path / "x.safetensors", {"a": torch.zeros(100)})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"x\.safetensors: damaged \(its checksum is not"):
        load_state(path)
    path.with_name("x.safetensors.json").unlink()  # as from elsewhere: safetensors itself finds nothing
    assert load_state(path)["a"][-1] != 0


def test_digest_is_of_the_content() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert source_hash("models") != source_hash("data")
    assert source_hash() == source_hash()


def test_the_code_of_a_run_is_what_computes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = shutil.copytree(runs.PACKAGE, tmp_path / "symbiotic")
    for module in (runs, files):
        monkeypatch.setattr(module, "PACKAGE", package)
    before = run_code()
    for name in ("launch.py", "studies/report.py", "claim.py"):
        (tmp_path / "symbiotic" / name).write_text("# another report, another order of runs\n")
    assert run_code() == before
    for name in ("models/moe.py", "schema.py", "studies/benchmarks.py", "evaluation/embedded.py"):
        (tmp_path / "symbiotic" / name).write_text("# another result\n")
        changed = run_code()
        assert changed != before, name
        before = changed


def test_the_journal_knows_the_time_of_last_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with Journal(tmp_path / "seconds.json").step("work", "key", "do it", tmp_path):
            pass
    first, second = capsys.readouterr().out.split("== work")[1:]
    assert "no estimate yet" in first
    assert "about 0 s" in second


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(small_disk: Path) -> None:
    with pytest.raises(RunError, match=r"x\.safetensors: not written: need 1 MB, have 0 MB"):
        save_state(small_disk / "x.safetensors", {"a": torch.zeros(200_000)})
    with pytest.raises(CheckpointError, match=r"step=000001\.ckpt: checkpoint not written: need 1 MB, have 0 MB"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(200_000)}, small_disk / "step=000001.ckpt")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_is_full_when_the_manifest_is_written_costs_no_older_file(small_disk: Path) -> None:
    """The new file fits to the last page, what is to be said of it does not."""
    path, state = small_disk / "step=000001.ckpt", {"state_dict": {"a": torch.ones(10_000)}}
    AtomicCheckpointIO().save_checkpoint(state, path)
    disk = os.statvfs(small_disk)
    pages = -(-path.stat().st_size // disk.f_frsize)
    (small_disk / "filler").write_bytes(bytes((disk.f_bfree - pages) * disk.f_frsize))
    assert os.statvfs(small_disk).f_bfree == pages
    for again in (path, small_disk / "step=000002.ckpt"):
        with pytest.raises(
            CheckpointError, match=rf"{again.name}: checkpoint not written: .*(No space|need)"
        ) as caught:
            AtomicCheckpointIO().save_checkpoint(state, again)
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in small_disk.iterdir()) == ["filler", path.name, f"{path.name}.json"]
        assert defect(path) is None


def test_a_disk_that_fills_up_under_the_records_names_them_and_what_is_free(small_disk: Path) -> None:
    """A row of the table, an event, scores: the line has the file, and what was there is whole."""
    table, scores = CSVLog(str(small_disk)), small_disk / "scores.jsonl"
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(small_disk))

    def event(text: str) -> None:
        record_event(trainer, 1, "phase", text)

    table.log_metrics({"a": 1.0}, step=1)
    event("begun")
    record_scores(scores, 1, {"reading": 0.5})
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    big = {f"column {n}": 1.0 for n in range(2000)}
    acts = {
        "metrics.csv": lambda: table.log_metrics(big, step=2),
        "events.jsonl": lambda: event("x" * 9000),
        "scores.jsonl": lambda: record_scores(scores, 2, big),
    }
    for name, act in acts.items():
        with pytest.raises(OSError, match="No space left") as caught:
            act()
        line = str(one_line(caught.value))
        assert line.startswith(f"the disk is full: {small_disk / name} (have 0.0 MB); free some space"), line
    assert [row["a"] for row in read_rows(table.path)] == ["1"]
    assert [found["text"] for found in read_events(small_disk)] == ["begun"]
    assert read_scores(scores) == {1: {"reading": 0.5}}


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ({"a": torch.ones(3), "b": {"c": [torch.tensor([1.0, float("nan")])]}}, "b.c.0"),
        ({"a": torch.tensor([float("inf"), -float("inf")])}, "a"),
        ({"lr": float("nan")}, "lr"),
        ({"big": torch.full((4,), 3e38), "half": torch.full((99,), 6e4, dtype=torch.float16)}, None),
        ({"n": torch.tensor([1]), "empty": torch.zeros(0), "text": "nan", "flag": True, "one": 1}, None),
        ({"s": torch.tensor(float("nan"), dtype=torch.bfloat16)}, "s"),
    ],
)
def test_what_is_not_finite_is_named(state: dict[str, Any], name: str | None) -> None:
    assert not_finite(state) == name


def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    bad = {"w": torch.tensor([0.0, float("nan")])}
    with pytest.raises(RunError, match=r"x\.safetensors: not written: w is not finite"):
        save_state(tmp_path / "x.safetensors", bad)
    moments = {"state": {0: {"exp_avg": torch.tensor([float("inf")])}}, "param_groups": []}
    good = {"state_dict": {"w": torch.ones(2)}, "callbacks": {"log": {"mean": float("nan")}}}
    for checkpoint, name in (
        ({"state_dict": bad}, "w"),
        ({**good, "optimizer_states": [moments]}, r"optimizer 0\.0\.exp_avg"),
    ):
        with pytest.raises(CheckpointError, match=rf"step=000001\.ckpt: checkpoint not written: {name} is not finite"):
            AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step=000001.ckpt")
    assert list(tmp_path.iterdir()) == []
    AtomicCheckpointIO().save_checkpoint(good, tmp_path / "step=000001.ckpt")
    assert defect(tmp_path / "step=000001.ckpt") is None
