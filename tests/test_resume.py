"""A run goes on as it began: other settings, code or data are refused by name, or allowed by name and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from symbiotic import arc
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.callbacks.events import read_events, rewind_events
from symbiotic.callbacks.in_loop_evaluation import read_scores
from symbiotic.config import compose
from symbiotic.files import read_json, write_json
from symbiotic.resume import CHANGES, SETTINGS, changes, hold, settings
from symbiotic.runs import provenance
from symbiotic.schema import Config, ConfigError, RunError

SMOKE = ("experiment=smoke", "evaluation.every=0", "phases.steps=8", "save_every=4", "logger.tensorboard=null")
MADE = {"code": "c0de", "torch": "2.15", "numpy": "2.3", "lightning": "2.6"}


def smoke(shared: Path, folder: Path, *more: str) -> Config:
    paths = [f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    return compose([*SMOKE, *paths, f"run_dir={folder}", *more])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("rates.lr=1e-3", r"rates\.lr 0\.0003 -> 0\.001"),
        ("data.samples=8", r"data\.samples \d+ -> 8"),
        ("seed=1", r"seed 0 -> 1"),
        ("system=standard_moe rates=uniform phases=none", r"system\.name symbiotic -> standard_moe; "),
        ("callbacks.routing_heatmap=null", r"callbacks\.routing_heatmap None -> None"),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(change: str, line: str, tmp_path: Path) -> None:
    began = compose([*SMOKE])
    hold(tmp_path, settings(began, MADE, "f00d"), (), begun=False, step=lambda: 0)
    now = settings(compose([*SMOKE, *change.split()]), MADE, "f00d")
    if "null" in change:
        line = r"callbacks\.routing_heatmap\._target_ symbiotic\.callbacks\.routing_heatmap\.RoutingHeatmap -> None"
    with pytest.raises(RunError, match=line) as caught:
        hold(tmp_path, now, (), begun=True, step=lambda: 4)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: this run began otherwise: ")
    assert not (tmp_path / CHANGES).exists()


@pytest.mark.parametrize(
    ("key", "old", "new"), [("code", "c0de", "0dd"), ("torch", "2.15", "2.0"), ("corpus", "f00d", "bad")]
)
def test_other_code_versions_and_data_are_named(key: str, old: str, new: str, tmp_path: Path) -> None:
    config = compose([*SMOKE])
    hold(tmp_path, settings(config, MADE, "f00d"), (), begun=False, step=lambda: 0)
    now = settings(config, MADE, "f00d") | {key: new}
    with pytest.raises(RunError, match=rf"began otherwise: {key} {old} -> {new}; .*allow_changes=\[{key}\]"):
        hold(tmp_path, now, (), begun=True, step=lambda: 4)


@pytest.mark.parametrize(
    "free",
    ["threads=2", "save_every=1", "paths.cache=/other", "metric=reading", "data.num_workers=2", "trainer.devices=2"],
)
def test_what_changes_no_result_may_differ(free: str, tmp_path: Path) -> None:
    hold(tmp_path, settings(compose([*SMOKE]), MADE, "f00d"), (), begun=False, step=lambda: 0)
    more = ("trainer=ddp",) if "devices" in free else ()
    hold(tmp_path, settings(compose([*SMOKE, *more, free]), MADE, "f00d"), (), begun=True, step=lambda: 4)
    assert changes(tmp_path) == []


def test_an_allowed_change_is_recorded_once_and_is_the_new_state(tmp_path: Path) -> None:
    first, second = (
        settings(compose([*SMOKE]), MADE, "f00d"),
        settings(compose([*SMOKE, "rates.lr=1e-3"]), MADE, "f00d"),
    )
    hold(tmp_path, first, (), begun=False, step=lambda: 0)
    with pytest.raises(ConfigError, match=r"allow_changes=\[seed\]: has no effect: nothing of it differs"):
        hold(tmp_path, second, ("rates", "seed"), begun=True, step=lambda: 4)
    hold(tmp_path, second, ("rates",), begun=True, step=lambda: 4)
    hold(tmp_path, second, ("rates",), begun=True, step=lambda: 6)  # the same command again
    hold(tmp_path, second, (), begun=True, step=lambda: 6)
    (change,) = changes(tmp_path)
    assert {name: change[name] for name in ("key", "old", "new", "step")} == {
        "key": "rates.lr", "old": 3e-4, "new": 1e-3, "step": 4,
    }  # fmt: skip
    with pytest.raises(RunError, match=r"rates\.lr 0\.001 -> 0\.0003"):
        hold(tmp_path, first, (), begun=True, step=lambda: 6)


def test_before_anything_was_begun_everything_may_change(tmp_path: Path) -> None:
    hold(tmp_path, settings(compose([*SMOKE]), MADE, "f00d"), (), begun=False, step=lambda: 0)
    hold(tmp_path, settings(compose([*SMOKE, "seed=3"]), MADE, "f00d"), (), begun=False, step=lambda: 0)
    assert read_json(tmp_path / SETTINGS)["seed"] == 3


def test_a_run_without_settings_is_not_continued(tmp_path: Path) -> None:
    write_json(tmp_path / "receipt.json", {"parent": "stage 0"})
    with pytest.raises(RunError, match=r"begun by code that kept no settings\.json, and no .* remove the folder"):
        hold(tmp_path, settings(compose([*SMOKE]), MADE, "f00d"), (), begun=True, step=lambda: 0)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"17\n", b"[1, 2]\n", b'{"step": 1}\n', b"{"])
def test_damaged_lines_of_the_records_cost_themselves(damage: bytes, tmp_path: Path) -> None:
    event, scores = {"step": 3, "kind": "phase", "text": "x"}, {"step": 5, "scores": {"reading": 0.5}}
    (tmp_path / "events.jsonl").write_bytes(damage + b"\n" + json.dumps(event).encode() + b"\n")
    assert read_events(tmp_path) == [event]
    rewind_events(tmp_path, 3)
    assert read_events(tmp_path) == [event]
    (tmp_path / "scores.jsonl").write_bytes(damage + b"\n" + json.dumps(scores).encode() + b"\n")
    assert read_scores(tmp_path / "scores.jsonl") == {5: {"reading": 0.5}}
    (tmp_path / "metrics.csv").write_bytes(b"step,a\n1,2\n" + damage + b"\n3,4\n")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["1", "3"]
    (tmp_path / "settings.json").write_bytes(damage)
    if damage == b"[1, 2]\n":
        with pytest.raises(RunError, match=r"its settings\.json is damaged"):
            hold(tmp_path, settings(compose([*SMOKE]), MADE, "f00d"), (), begun=True, step=lambda: 0)


def test_damaged_lines_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    event = {"step": 3, "kind": "phase", "text": "x"}
    (tmp_path / "events.jsonl").write_text(f"{{x\n{json.dumps(event)}\n[1]\n{json.dumps(event)[:9]}")  # killed there
    (tmp_path / "metrics.csv").write_text("step,a\n1,2\nx,y,z\n3,")
    for _ in range(2):
        assert read_events(tmp_path) == [event]
        assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["1"]
    told = [(path.name, lines) for path, lines in (record.args for record in caplog.records)]
    assert told == [("events.jsonl", 2), ("metrics.csv", 1)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_is_changed_on_the_way_says_so(shared_tmp: Path, tmp_path: Path) -> None:
    """It ends, with another learning rate and seed than it began with; summary, record and audit have it."""
    config = smoke(shared_tmp, tmp_path / "run")
    arc.run(config)
    folder = Path(config.run_dir)
    before = read_json(folder / "summary.json")
    whole = bytes_of(folder)
    for change, line in (
        ("seed=1 data.samples=8", r"seed 0 -> 1; data\.samples \d+ -> 8"),
        ("model.num_layers=3", "2 -> 3"),
    ):
        with pytest.raises(RunError, match=rf"this run is finished, and was another: .*{line}; take another run_dir"):
            arc.run(smoke(shared_tmp, folder, *change.split()))
    arc.run(smoke(shared_tmp, folder))
    assert bytes_of(folder) == whole
    for name in ("model.safetensors", "summary.json", "checkpoints/step=000008.ckpt"):
        (folder / name).unlink()
    left = bytes_of(folder)
    with pytest.raises(RunError, match=r"seed 0 -> 1; rates\.lr 0\.0003 -> 0\.001; .*allow_changes=\[seed,rates\.lr\]"):
        arc.run(smoke(shared_tmp, folder, "rates.lr=1e-3", "seed=1"))
    assert bytes_of(folder) == left
    arc.run(smoke(shared_tmp, folder, "rates.lr=1e-3", "seed=1", "allow_changes=[seed,rates.lr]"))
    summary = read_json(folder / "summary.json")
    assert [(change["key"], change["step"]) for change in summary["changes"]] == [("seed", 4), ("rates.lr", 4)]
    assert "step 4: rates.lr was changed from 0.0003 to 0.001" in (folder / "summary.txt").read_text()
    assert summary["parent"] == before["parent"]
    assert summary["anchors"]["stage 0"] == before["anchors"]["stage 0"]
    assert provenance()["code"] == summary["provenance"]["code"]


def test_the_audit_names_changed_runs_and_skipped_steps() -> None:
    from symbiotic.studies.audit import Arm

    summary = {"changes": [{"key": "rates.lr"}, {"key": "rates.lr"}], "events": {"skipped": 2}}
    arm = Arm("a", (SimpleNamespace(seed=3, summary=summary),))  # type: ignore[arg-type]
    assert arm.changed == {3: ["rates.lr"]}
    assert arm.skipped == {3: 2}
