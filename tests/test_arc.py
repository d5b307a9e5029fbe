"""The arc of a run, for real, on the tiny model: every system, golden losses, resume, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from assets import write_assets
from factory import SYSTEMS
from symbiotic import arc
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.callbacks.events import read_events
from symbiotic.config import compose
from symbiotic.evaluation.assets import ASSETS
from symbiotic.runs import load_state, read_json, state_hash, write_json
from symbiotic.schema import Config, ConfigError, RunError

GOLDEN = Path(__file__).parent / "golden"
TORCH = ".".join(torch.__version__.split(".")[:2])


FEW = ("phases=none", "phases.steps=2", "evaluation.every=0")
"""Of a run whose training does not matter."""


def overrides(shared: Path, runs: Path, *more: str) -> list[str]:
    paths = [f"paths.runs={runs}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    return ["experiment=smoke", "log_every=1", "logger.tensorboard=null", *paths, *more]


def trace(config: Config, column: str = "train/loss") -> list[float]:
    """What was logged at every step of joint training."""
    return [float(row[column]) for row in read_rows(Path(config.run_dir) / "metrics.csv") if row.get(column)]


def run(shared: Path, runs: Path, *more: str) -> Config:
    config = compose(overrides(shared, runs, *more))
    arc.run(config)
    return config


def command(arguments: Sequence[str], root: Path) -> list[str]:
    return [sys.executable, str(root / "src" / "train.py"), *arguments]


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_and_keeps_its_golden_losses(
    system: str, shared_tmp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 joint steps. Traces are kept per minor version of torch; `make golden` writes those of the one installed."""
    config = run(shared_tmp, tmp_path, f"system={system}")
    losses = trace(config)
    assert len(losses) == 20
    assert all(torch.isfinite(torch.tensor(losses)))
    summary = read_json(Path(config.run_dir) / "summary.json")
    assert {"knowledge_unreplayed", "reading", "flow_error", "embedded_acc"} <= set(summary["scores"])
    assert ("routing/capacity@1/vae" in summary["routing"]) == (system != "dense")
    assert summary["tokens"]["t2i"] > summary["tokens"]["lm"] > 0
    printed = capsys.readouterr().out
    assert "iteration 0" in printed
    path = GOLDEN / f"torch-{TORCH}.json"
    if "SYMBIOTIC_WRITE_GOLDEN" in os.environ:
        known = (json.loads(path.read_text()) if path.exists() else {}) | {system: losses}
        lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if not path.exists():
        pytest.skip(f"no golden losses for torch {TORCH}")
    assert losses == pytest.approx(json.loads(path.read_text())[system], rel=1e-4)


def test_a_damaged_asset_costs_a_training_one_line(
    shared_tmp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = write_assets(tmp_path / "assets", images=2)
    checkpoint = assets / "hps" / "HPS_v2.1_compressed.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    monkeypatch.setenv(ASSETS, str(assets))
    hps, clip = (
        f"++evaluation.benchmarks.{name}._target_=symbiotic.evaluation.{name}" for name in ("hps", "clip_score")
    )
    few = ("phases=none", "phases.steps=3", "evaluation.every=2", "evaluation.images=2")
    config = run(shared_tmp, tmp_path, f"{hps}.HPSv2", f"{clip}.CLIPScore", *few)
    assert capsys.readouterr().out.count("evaluation: FAILED: hps_v2.1: ") == 1
    scores = read_json(Path(config.run_dir) / "summary.json")["scores"]
    assert {"embedded_acc", "clip_score"} <= set(scores)
    assert "hps_v2.1" not in scores


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains_on_understanding_only(system: str, shared_tmp: Path, tmp_path: Path) -> None:
    few = ("mix=und_only", "phases=none", "phases.steps=3", "evaluation.every=0", "evaluation.images=2")
    one_task = ("system.task_router=false",) if system == "utamoe" else ()  # nothing for it to learn
    config = run(shared_tmp, tmp_path, f"system={system}", *few, *one_task)
    assert len(trace(config)) == 3
    assert trace(config, "tokens/vae") == [0.0, 0.0, 0.0]
    before = load_state(Path(config.run_dir) / "init.safetensors")
    after = load_state(Path(config.run_dir) / "model.safetensors")
    assert torch.equal(before["latent_head.weight"], after["latent_head.weight"])
    assert not torch.equal(before["text_head.weight"], after["text_head.weight"])


def test_the_understanding_samples_of_the_control_are_those_of_the_full_mix(shared_tmp: Path, tmp_path: Path) -> None:
    """Matched tokens: the control sees the same words and read patches, and nothing else."""
    few = ("phases=none", "phases.steps=3", "evaluation.every=0", "evaluation.images=2")
    full, control = (run(shared_tmp, tmp_path, *few, f"mix={mix}") for mix in ("joint", "und_only"))
    for kind in ("text", "vit"):
        assert trace(full, f"tokens/{kind}") == trace(control, f"tokens/{kind}")


def test_two_runs_are_bit_equal(shared_tmp: Path, tmp_path: Path) -> None:
    one, two = (run(shared_tmp, tmp_path / name) for name in ("one", "two"))
    assert trace(one) == trace(two)
    a, b = (load_state(Path(config.run_dir) / "model.safetensors") for config in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_arms_share_the_parent_and_dense_has_its_own(shared_tmp: Path, tmp_path: Path) -> None:
    parents = []
    for system in ("symbiotic", "standard_moe", "dense"):
        config = run(tmp_path, tmp_path / "runs", f"system={system}", *FEW, f"paths.data={shared_tmp / 'data'}")
        parents.append(read_json(Path(config.run_dir) / "summary.json")["parent"])
    assert parents[0] == parents[1] != parents[2]
    assert len(list((tmp_path / "cache" / "stage0").iterdir())) == 2


def test_a_parent_alone_is_made_once_and_then_found(
    shared_tmp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"paths.data={shared_tmp / 'data'}"
    config = run(tmp_path, tmp_path / "runs", data, "parent_only=true")
    (parent,) = (tmp_path / "cache" / "stage0").glob("*/parent.safetensors")
    made = parent.stat().st_mtime_ns
    assert not (Path(config.run_dir) / "init.safetensors").exists()
    capsys.readouterr()
    whole = run(tmp_path, tmp_path / "runs", data, *FEW)
    assert "take the cached parent" in capsys.readouterr().out
    assert parent.stat().st_mtime_ns == made
    assert read_json(Path(whole.run_dir) / "summary.json")["parent"] == f"stage 0 {parent.parent.name}"


def test_a_damaged_parent_and_a_damaged_start_are_made_again(
    shared_tmp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = f"paths.data={shared_tmp / 'data'}"
    config = run(tmp_path, tmp_path / "runs", data, *FEW)
    (parent,) = (tmp_path / "cache" / "stage0").glob("*/parent.safetensors")
    folder = Path(config.run_dir)
    files = (parent, folder / "init.safetensors", folder / "model.safetensors")
    before = [state_hash(load_state(path)) for path in files]
    for path in files[:2]:
        found = bytearray(path.read_bytes())
        found[-9] ^= 1
        path.write_bytes(found)
    (folder / "summary.json").unlink()
    arc.run(config)
    assert [state_hash(load_state(path)) for path in files] == before
    told = [record.getMessage() for record in caplog.records if "made again" in record.getMessage()]
    assert [line.partition(":")[0] for line in told] == [str(path) for path in files[:2]]


def test_a_finished_run_is_not_run_again(shared_tmp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run(shared_tmp, tmp_path, *FEW)
    first = (Path(config.run_dir) / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    value = arc.run(config)
    assert "is finished" in capsys.readouterr().out
    assert value == read_json(Path(config.run_dir) / "summary.json")["scores"]["knowledge_unreplayed"]
    assert (Path(config.run_dir) / "model.safetensors").stat().st_mtime_ns == first


def test_a_parent_from_a_checkpoint_gives_the_weights_of_that_parent(shared_tmp: Path, tmp_path: Path) -> None:
    """The split may differ (without a stage 0 the profile is of the understanding part of the mix): the rest not."""
    one = run(shared_tmp, tmp_path / "one", *FEW)
    key = read_json(Path(one.run_dir) / "summary.json")["parent"].split()[-1]
    parent = shared_tmp / "cache" / "stage0" / key / "parent.safetensors"
    two = run(shared_tmp, tmp_path / "two", *FEW, "init=checkpoint", f"init.checkpoint={parent}")
    a, b = (load_state(Path(config.run_dir) / "init.safetensors") for config in (one, two))
    assert a.keys() == b.keys()
    common = [name for name in a if ".moe.pools." not in name and ".moe.routers." not in name]
    assert all(torch.equal(a[name], b[name]) for name in common)
    assert str(parent) in read_json(Path(two.run_dir) / "receipt.json")["parent"]


def test_a_run_does_not_go_on_from_another_parent(shared_tmp: Path, tmp_path: Path) -> None:
    config = run(shared_tmp, tmp_path, *FEW)
    (Path(config.run_dir) / "summary.json").unlink()
    found = read_json(Path(config.run_dir) / "receipt.json")
    write_json(Path(config.run_dir) / "receipt.json", found | {"parent": "stage 0 of yesterday"})
    with pytest.raises(RunError, match="started from the parent 'stage 0 of yesterday', which is now 'stage 0 "):
        arc.run(config)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.vocab_size=64", r"model\.vocab_size=64: must be at least \d+, the corpus's words"),
        ("model.patch_dim=75", r"model\.patch_dim=75: must be 48"),
        ("model.max_grid=3", r"model\.max_grid=3: must be at least 5"),
    ],
)
def test_a_model_that_the_corpus_does_not_fit_is_refused(
    change: str, line: str, shared_tmp: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=line):
        run(shared_tmp, tmp_path, change)


def test_a_parent_of_another_size_is_refused_by_name(shared_tmp: Path, tmp_path: Path) -> None:
    one = run(shared_tmp, tmp_path / "one", *FEW)
    parent = Path(one.run_dir) / "model.safetensors"  # a split model is no parent
    with pytest.raises(RunError, match=r"no parameter .blocks\.0\.moe\.pools\.all\.w_in."):
        run(shared_tmp, tmp_path / "two", "init=checkpoint", f"init.checkpoint={parent}")


def test_dry_run_prints_the_tables_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose(overrides(tmp_path, tmp_path / "runs", "dry_run=true"))
    arc.run(config)
    printed = capsys.readouterr().out
    assert "shield" in printed
    assert "routed experts und" in printed
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_and_recomputed_blocks_train_under_every_instrument_and_surgery(
    shared_tmp: Path, tmp_path: Path
) -> None:
    few = ("phases=none", "phases.steps=4", "evaluation.every=0", "callbacks.gradient_conflict.every=2")
    plain = run(shared_tmp, tmp_path / "eager", *few, "surgery=upgrad")
    compiled = run(shared_tmp, tmp_path / "compiled", *few, "surgery=upgrad", "compile=aot_eager", "recompute=true")
    assert trace(compiled) == pytest.approx(trace(plain), rel=1e-4)
    for column in ("conflict/shared/cosine", "leak/all", "routing/drift/text"):
        assert trace(compiled, column) == pytest.approx(trace(plain, column), rel=1e-2, abs=1e-4)


PHASES = (
    "{name:warm,until:9,shield:1.0,frozen:[und],mix:{t2i:1,lm:1}}",
    "{name:shield,until:20,shield:1.0,when:{metric:train/ce,below:100.0,logs:2}}",
    "{name:joint,until:28,shield:0.9,balance:0.05}",
    "{name:last,until:${phases.steps},shield:0.5,mix:{t2i:3,lm:2,mmu:2},rate:{gen:0.5}}",
)
EVERYTHING = (
    f"phases.list=[{','.join(PHASES)}]",
    "phases.steps=40",
    "log_every=3",
    "save_every=4",
    "surgery=upgrad",
    "rates=per_role",
    "rates.schedules.gen.decay=0.3",
    "rates.schedules.latent.decay=0.3",
    "model.router.bias=true",
    "objective.balance.bias_rate=0.001",
    "callbacks.gradient_conflict.every=7",
    "callbacks.collapse_alarm.action=rebalance",
    "callbacks.collapse_alarm.ratio=0.9",
    "callbacks.collapse_alarm.clear=0.95",
    "callbacks.collapse_alarm.patience=2",
)
"""Every mechanism with a memory at once; the alarm is set so that it acts."""


def record(config: Config) -> tuple[list[dict[str, str]], list[Any]]:
    """Rows of metrics.csv without the speeds, and the events."""
    rows = read_rows(Path(config.run_dir) / "metrics.csv")
    plain = [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]
    return plain, read_events(config.run_dir)


def test_a_killed_run_with_every_mechanism_resumes_bit_exactly(
    shared_tmp: Path, tmp_path: Path, project_root: Path
) -> None:
    """Killed behind the first transition: metrics, events, biases and weights are those of an undisturbed run."""
    reference = run(shared_tmp, tmp_path / "whole", *EVERYTHING)
    rows, events = record(reference)
    assert [event["phase"] for event in events if event["kind"] == "phase"] == ["shield"]
    assert [event for event in events if event["kind"] == "intervention"]
    assert {row["phase/index"] for row in rows if row["phase/index"]} == {"0", "1", "2", "3"}
    arguments = overrides(shared_tmp, tmp_path / "killed", *EVERYTHING)
    config = compose(arguments)
    folder = Path(config.run_dir) / "checkpoints"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(arguments, project_root), **quiet) as process:
        while process.poll() is None and not list(folder.glob("step=00001[6-9].ckpt")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    arc.run(config)
    assert record(config) == (rows, events)
    a, b = (load_state(Path(c.run_dir) / "model.safetensors") for c in (config, reference))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert max(float(a[name].abs().max()) for name in a if name.endswith("moe.bias")) > 0


def test_two_processes_go_through_the_whole_arc_with_the_samples_of_one(
    shared_tmp: Path, tmp_path: Path, project_root: Path
) -> None:
    four = ("data.micro_batches=4", "data.samples=8")  # two ranks that accumulate two micro-batches each
    one = run(shared_tmp, tmp_path / "one", *four)
    arguments = overrides(tmp_path, tmp_path / "two", "trainer=ddp", *four)  # own cache: both fits run in two ranks
    done = subprocess.run(command(arguments, project_root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = compose(arguments)
    assert trace(two) == pytest.approx(trace(one), rel=1e-5)
    for kind in ("text", "prompt", "vit", "vae"):
        assert trace(two, f"tokens/{kind}") == trace(one, f"tokens/{kind}")
    summaries: list[Any] = [read_json(Path(c.run_dir) / "summary.json")["routing"] for c in (one, two)]
    assert summaries[1] == pytest.approx(summaries[0], rel=2e-3)
