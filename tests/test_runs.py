"""Files around a run: whole or absent, readable or refused in one line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from symbiotic import files, runs
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO, CheckpointError
from symbiotic.runs import (
    Journal,
    digest,
    load_state,
    read_json,
    replace_with,
    run_code,
    save_state,
    source_hash,
    write_json,
)
from symbiotic.schema import RunError


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"old": 1})

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        replace_with(path, broken)
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


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
    with pytest.raises(RunError, match=r"x\.safetensors: not written: .*No space left"):
        save_state(small_disk / "x.safetensors", {"a": torch.zeros(200_000)})
    with pytest.raises(CheckpointError, match=r"step=000001\.ckpt: checkpoint not written: need 1 MB, have 0 MB"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(200_000)}, small_disk / "step=000001.ckpt")
    assert list(small_disk.iterdir()) == []
