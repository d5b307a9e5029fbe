"""A checkpoint is whole or absent, a damaged one is passed over, and a resumed fit is the uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import resource
import zipfile
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
    superseded,
)
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.log import StepLog
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.progress import Progress
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.files import announced, commit, commit_folder, described, manifest_of, read_manifest, uncommitted


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
    assert names(path.parent) == ["step=000007.ckpt", "step=000007.ckpt.json"]


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


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """300 anywhere in the file: in weights, names, the archive's directory, and the padding that no reader looks at."""
    old, path = write(tmp_path, 2, 3)
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(300):
        place = rng.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert newest_valid(tmp_path) == old
        with pytest.raises(CheckpointError, match=r"step=000003\.ckpt: corrupt checkpoint \(its checksum"):
            AtomicCheckpointIO().load_checkpoint(path)


def test_a_damaged_manifest_is_no_manifest(tmp_path: Path) -> None:
    old, new = write(tmp_path, 1, 2)
    manifest = new.with_name(f"{new.name}.json")
    facts = json.loads(manifest.read_text())
    assert facts["bytes"] == new.stat().st_size
    assert facts["sha256"] == hashlib.sha256(new.read_bytes()).hexdigest()
    for text in ("", "[]", "{", "{}", json.dumps(facts | {"sha256": 64 * "0"}), json.dumps(facts | {"bytes": 1})):
        manifest.write_text(text)
        assert newest_valid(tmp_path) == old, text
    manifest.write_text(json.dumps(facts))
    assert newest_valid(tmp_path) == new


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path: Path) -> None:
    """It is read as it was, or the one before counts; nothing else is said of the run."""
    new = write(tmp_path, 1, 2)[1]
    about = {"settings": "c0ffee", "data": "f00d"}
    AtomicCheckpointIO(about).save_checkpoint(state(3), checkpoint_path(tmp_path, 3))
    path = checkpoint_path(tmp_path, 3)
    manifest = manifest_of(path)
    data, facts = manifest.read_bytes(), read_manifest(path)
    assert facts["settings"] == "c0ffee"
    for place in range(0, len(data) * 8):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        found = read_manifest(path)
        assert found == {} or {key: found.get(key) for key in facts} == facts, place
        announced(path)
        if place % 16 == 0:
            assert newest_valid(tmp_path) == (path if found else new)


def test_no_flipped_bit_of_the_manifest_of_a_folder_is_believed(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "a").write_bytes(b"abc")
    path = commit_folder(folder, checkpoint_path(tmp_path, 4), {"step": 4, "files": described([folder / "a"])})
    manifest = manifest_of(path)
    data = manifest.read_bytes()
    assert uncommitted(path) is None
    for place in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        assert announced(path) == (uncommitted(path) is None)


def test_sums_that_torch_does_not_look_at_are_left_out_of_checkpoints_alone(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    assert torch.serialization.get_crc32_options()
    torch.save(torch.load(path, weights_only=True), tmp_path / "plain.pt")
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(tmp_path / "plain.pt") as other:
        assert other.testzip() is None
        assert one.testzip() is not None
    assert defect(path) is None


def test_what_a_manifest_says_of_the_run(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 5)
    AtomicCheckpointIO({"config": "c0ffee", "data": "f00d"}).save_checkpoint({"global_step": 5}, path)
    facts = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert facts["step"] == 5
    assert (facts["config"], facts["data"]) == ("c0ffee", "f00d")


def test_a_file_whose_writing_did_not_end_neither_counts_nor_displaces_one_that_does(tmp_path: Path) -> None:
    files = write(tmp_path, 1, 2, 3, 4, 5)
    for path in (files[1], files[3]):
        path.with_name(f"{path.name}.json").unlink()
    assert newest_valid(tmp_path) == files[4]
    assert superseded(tmp_path, keep=2) == files[:2]
    assert superseded(tmp_path, keep=3) == []
    assert superseded(tmp_path, keep=4) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = write(tmp_path, 1)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"step=000002\.ckpt: checkpoint not written: need 4 MB, have 0 MB"):
        AtomicCheckpointIO().save_checkpoint(state(2, 1_000_000), checkpoint_path(tmp_path, 2))
    assert names(tmp_path) == [old.name, f"{old.name}.json"]


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
    assert names(tmp_path) == [old.name, f"{old.name}.json"]
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
    with pytest.raises(CheckpointError, match=r"corrupt checkpoint \(no sound step=000001\.ckpt\.json"):
        AtomicCheckpointIO().load_checkpoint(path)
    commit(path, lambda p: torch.save({"weights": Evil()}, p), manifest={})  # whoever writes one can write the other
    with pytest.raises(CheckpointError, match=r"corrupt checkpoint .*[Ww]eights.only"):
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
    files = ["step=000006.ckpt", "step=000007.ckpt"]
    assert names(tmp_path / "c") == [name for file in files for name in (file, f"{file}.json")]


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
