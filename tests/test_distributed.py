"""Runs of several processes that torchrun starts: equal to one process, on any number of ranks, whole or absent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from campaigns import family
from equality import BASE, MODES, ROOT, command, difference, environment, folder_of, folders, trained
from symbiotic import arc
from symbiotic.callbacks.checkpoint import checkpoints, defect, newest_valid, read
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.config import compose
from symbiotic.files import manifest_of
from symbiotic.trained import load_model, weights_file

CLOSE = 1e-5  # relative, of losses and gradient norms
FEW = ("phases.steps=3", "phases.shield_steps=2", "data.micro_batches=4", "save_every=2", "evaluation.every=2")
LONG = ("phases.steps=24", "phases.shield_steps=6", "save_every=100", "evaluation.every=0", "callbacks=[default,ema]")
SHARED_OUT = ("trainer=fsdp", "trainer.expert_parallel=2")


def start(processes: int, overrides: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command(processes, overrides), stdout=file, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT
        )


def behind(run: Path, step: int, process: subprocess.Popen[bytes], patience: float = 300.0) -> None:
    """Wait until a run has logged a step, or has ended."""
    deadline = time.monotonic() + patience
    while process.poll() is None:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        rows = read_rows(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
        if any(int(row["step"]) >= step for row in rows):
            return
        time.sleep(0.02)


def test_two_processes_that_share_the_experts_out_go_through_the_whole_arc(shared_tmp: Path, tmp_path: Path) -> None:
    """Against one process: losses, norms, scores, averaged weights; and what is in a checkpoint of both."""
    config = compose(
        [*BASE, *FEW, "callbacks=[default,ema]", *folders(shared_tmp, tmp_path / "one", shared_tmp / "cache")]
    )
    arc.run(config)
    one = Path(config.run_dir)
    paths = folders(shared_tmp, tmp_path / "two", shared_tmp / "cache")
    two = trained(2, [*BASE, *FEW, "callbacks=[default,ema]", *paths, *SHARED_OUT])
    assert one.name == two.name, "where it runs changes no run folder"
    found = difference(one, two)
    assert max(found["train/"], found["grad_norm/"]) < CLOSE
    assert found["weights"] < 1e-5
    a, b = (load_file(run / "ema.safetensors") for run in (one, two))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
    assert not any("conflict/" in name for row in read_rows(two / "metrics.csv") for name in row)
    saved = [path.name for path in checkpoints(two / "checkpoints")]
    assert saved == ["step=000002.ckpt", "step=000003.ckpt"]
    a, b = (read(newest_valid(run / "checkpoints") or run) for run in (one, two))
    close(a["state_dict"], b["state_dict"])
    for x, y in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert [group["params"] for group in x["param_groups"]] == [group["params"] for group in y["param_groups"]]
        assert [group["role"] for group in x["param_groups"]] == [group["role"] for group in y["param_groups"]]
        for number, fields in x["state"].items():
            close(fields, y["state"][number])
    config = compose([*BASE, *FEW, *paths])
    close(load_model(config, weights_file(two, step=3), "cpu").state_dict(), load_file(two / "model.safetensors"))
    damaged(two / "checkpoints" / "step=000003.ckpt")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)


def damaged(path: Path) -> None:
    """One bit, a missing part, and a missing manifest: each is found."""
    assert defect(path) is None
    part = path / "shard-00002-model-00001-of-00001.safetensors"
    data = part.read_bytes()
    part.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    assert defect(path) == f"{part.name}: its checksum is not that of what was written"
    part.unlink()
    assert defect(path) == f"{part.name}: No such file or directory"
    part.write_bytes(data)
    assert defect(path) is None
    manifest_of(path).unlink()
    assert "its writing did not come to an end" in str(defect(path))
    assert newest_valid(path.parent) == path.with_name("step=000002.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "one process"])
def test_every_mode_has_the_losses_of_one_process(mode: str, shared_tmp: Path, tmp_path: Path) -> None:
    """Each trains its stage 0 too."""
    more = [*BASE, "phases.steps=4", "phases.shield_steps=2"]
    whole = trained(0, [*more, *folders(shared_tmp, shared_tmp / "whole", shared_tmp / "whole-cache")])
    processes, overrides = MODES[mode]
    found = difference(whole, trained(processes, [*more, *overrides, *folders(shared_tmp, tmp_path, tmp_path)]))
    assert max(found["train/"], found["grad_norm/"]) < CLOSE


@pytest.mark.slow
def test_recomputed_blocks_and_bfloat16_are_those_of_one_process_too(shared_tmp: Path, tmp_path: Path) -> None:
    """bfloat16 rounds sums of other orders otherwise: only the first steps are held, and loosely."""
    more = [*BASE, "phases.steps=2", "phases.shield_steps=1", "recompute=true", "trainer.precision=bf16-mixed"]
    more += ["init.stage0.max_steps=2"]
    whole = trained(0, [*more, *folders(shared_tmp, tmp_path / "one", tmp_path / "cache")])
    paths = folders(shared_tmp, tmp_path / "four", tmp_path / "cache")
    found = difference(whole, trained(4, ["trainer=fsdp", "trainer.expert_parallel=2", *more, *paths]))
    assert found["train/"] < 1e-2


@pytest.mark.slow
def test_a_run_goes_on_with_two_four_and_one_process(shared_tmp: Path, tmp_path: Path) -> None:
    """Two that share experts out, four that also shard them, one that shards alone, one that does not shard."""
    paths = folders(shared_tmp, tmp_path / "whole", shared_tmp / "cache")
    whole = trained(0, [*BASE, *LONG, *paths])
    paths = folders(shared_tmp, tmp_path / "parts", shared_tmp / "cache")
    for stop, processes, more in ((4, 2, SHARED_OUT), (10, 4, SHARED_OUT), (15, 1, ("trainer=fsdp",))):
        arguments, log = [*BASE, *LONG, *paths, *more], tmp_path / f"{processes}.log"
        run, process = folder_of(arguments), start(processes, arguments, log)
        behind(run, stop, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
        assert log.read_text().count("stopped by SIGTERM; the same command goes on") == 1, log.read_text()
        newest = newest_valid(run / "checkpoints")
        assert newest is not None
        assert newest.is_dir()
    assert trained(0, [*BASE, *LONG, *paths]) == run
    found = difference(whole, run)
    assert max(found["train/"], found["grad_norm/"]) < CLOSE
    a, b = (load_file(folder / "ema.safetensors") for folder in (whole, run))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5


@pytest.mark.slow
def test_a_run_of_ddp_goes_on_sharded(shared_tmp: Path, tmp_path: Path) -> None:
    paths = folders(shared_tmp, tmp_path / "whole", shared_tmp / "cache")
    whole = trained(0, [*BASE, *LONG, *paths])
    arguments = [*BASE, *LONG, *folders(shared_tmp, tmp_path / "parts", shared_tmp / "cache")]
    run, process = folder_of(arguments), start(2, [*arguments, "trainer=ddp"], tmp_path / "log")
    behind(run, 8, process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    newest = newest_valid(run / "checkpoints")
    assert newest is not None
    assert newest.is_file()
    trained(2, [*arguments, *SHARED_OUT])
    assert max(difference(whole, run)[what] for what in ("train/", "grad_norm/")) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(rank: int, shared_tmp: Path, tmp_path: Path) -> None:
    whole = trained(0, [*BASE, *LONG, *folders(shared_tmp, tmp_path / "whole", shared_tmp / "cache")])
    arguments = [*BASE, *LONG, *SHARED_OUT, "save_every=3"]
    arguments += folders(shared_tmp, tmp_path / "parts", shared_tmp / "cache")
    run, process = folder_of(arguments), start(2, arguments, tmp_path / "log")
    behind(run, 8, process)
    everyone = family(process.pid)
    ranks = {
        int(environ(one)["RANK"]): one for one in everyone if "src/train.py" in words(one) and "RANK" in environ(one)
    }
    os.kill(ranks[rank], signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - killed < 45, "torchrun gives ranks 30 seconds to end by themselves"
    assert not [one for one in everyone if Path(f"/proc/{one}").exists()]
    newest = newest_valid(run / "checkpoints")
    assert newest is not None
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in (tmp_path / "log").read_text()
    trained(2, arguments)
    assert not list((run / "checkpoints").glob(".*")), "what was half written is gone"
    assert max(difference(whole, run)[what] for what in ("train/", "grad_norm/")) < CLOSE


def words(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def environ(process: int) -> dict[str, str]:
    pairs = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_named_and_nothing_of_it_is_kept(shared_tmp: Path, tmp_path: Path) -> None:
    arguments = [*BASE, *FEW, *SHARED_OUT, "objective.flow_weight=1e38", "rates.clip=0"]
    arguments += folders(shared_tmp, tmp_path, shared_tmp / "cache")
    process = start(2, arguments, tmp_path / "log")
    assert process.wait(120) == 1
    said = (tmp_path / "log").read_text()
    errors = re.findall(r"^error: .*", said, re.MULTILINE)
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: step 1: the loss is finite, its gradient is not at t2i")
    assert checkpoints(folder_of(arguments) / "checkpoints") == []


@pytest.mark.slow
def test_a_wrong_config_under_torchrun_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(command(2, ["experiment=smoke"]), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: trainer.devices=1: torchrun started 2 processes; take trainer=fsdp") == 1
