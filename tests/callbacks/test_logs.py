"""What is logged is complete, right, the same however a step is shared out, and survives a kill and a resume."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from crash import every_line
from factory import random_batch
from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.callbacks.csv_log import CSVLog, last_values, read_rows
from symbiotic.callbacks.log import StepLog, latest_metrics, num_samples
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.schema import KINDS, Phase

CLOCK = "speed/"  # metrics that no two runs share


class Spy(Callback):
    """Outputs of every micro-batch, recounted by hand in the test; gradient norms by plain sums."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        group = next(g for g in optimizer.param_groups if g["role"] == "gen")
        self.norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in group["params"])))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def deterministic(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def test_losses_are_means_over_the_micro_batches_since_the_last_log(fit: Any, memory: Any) -> None:
    spy = Spy()
    trainer, _ = fit([StepLog(every=2), LRPhases(), spy], steps=4, micro_batches=3, loggers=[memory])
    rows = memory.rows()
    assert list(rows) == [2, 4]
    for step, part in ((2, spy.outputs[:6]), (4, spy.outputs[6:])):
        sums = [float(o["ce"] + o["flow"] + 0.01 * o["balance"]) for o in part]  # the default objective
        assert rows[step]["train/loss"] == pytest.approx(sum(sums) / 6, rel=1e-6)
        for name in ("ce", "flow", "balance", "z"):
            mean = sum(float(o[name]) for o in part) / 6
            assert rows[step][f"train/{name}"] == pytest.approx(mean, rel=1e-6)
        tokens = sum(o["tokens"] for o in part) / 2
        assert [rows[step][f"tokens/{kind}"] for kind in KINDS] == pytest.approx(tokens.tolist())
        assert rows[step]["grad_norm/gen"] == pytest.approx(spy.norms[step - 1], rel=1e-4)
    assert rows[4]["lr/gen"] == pytest.approx(1e-2)
    assert rows[2]["phase/shield"] == 1.0
    assert latest_metrics(trainer)["train/ce"] == rows[4]["train/ce"]


def test_a_log_event_calls_each_logger_once_per_callback(fit: Any, memory: Any) -> None:
    fit([StepLog(every=3), RoutingMonitor(every=3), LRPhases()], steps=6, loggers=[memory])
    assert [step for step, _ in memory.calls] == [3, 3, 6, 6]
    assert all(isinstance(v, float) for _, metrics in memory.calls for v in metrics.values())


def test_routing_is_that_of_the_window_and_capacity_that_of_its_micro_batches(fit: Any, memory: Any) -> None:
    spy = Spy()
    fit([RoutingMonitor(every=2), LRPhases(), spy], steps=2, micro_batches=2, loggers=[memory])
    row = memory.rows()[2]
    counts = sum(o["routing"].counts for o in spy.outputs)
    vae = counts[1, KINDS.index("vae"), 4:]  # the generation pool: the last half of 8 experts
    assert row["routing/layer1/maxvio/vae"] == pytest.approx(float(vae.max() / vae.mean() - 1), rel=1e-5)
    each = [o["routing"].counts[1, KINDS.index("vae"), 4:] for o in spy.outputs]
    rates = [float(n.clamp(max=math.floor(n.sum() / 4)).sum() / n.sum()) for n in each]
    assert len(rates) == 4
    assert row["routing/layer1/capacity@1/vae"] == pytest.approx(sum(rates) / 4, rel=1e-5)
    assert row["routing/capacity@1/vae/random"] < 1.0
    assert row["routing/overlap/text-vae"] == pytest.approx(0.0, abs=1e-6)


def test_accumulation_and_frozen_counts_are_checked(fit: Any) -> None:
    class Lose(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            outputs["routing"].counts[0, 3, 5] += 7.0

    with pytest.warns(UserWarning, match=r"routing counts: layer 0 .* vae tokens"):
        fit([Lose(), RoutingMonitor(every=1), LRPhases()], steps=1)


def test_metrics_csv_is_complete_and_a_resume_continues_it(fit: Any) -> None:
    folder = fit.run_dir / "checkpoints"

    def parts() -> list[Callback]:
        return [StepLog(every=2), RoutingMonitor(every=2), LRPhases()]

    fit(parts(), steps=8, loggers=[CSVLog(str(fit.run_dir / "whole"))])
    whole = table(fit.run_dir / "whole" / "metrics.csv")
    assert [row["step"] for row in whole] == ["2", "4", "6", "8"]
    assert all(value not in ("", None) for row in whole for value in row.values())

    split = CSVLog(str(fit.run_dir / "split"))
    fit([*parts(), StepCheckpoint(str(folder), every=5)], steps=8, stop=7, loggers=[split])  # rows 2, 4, 6
    (folder / "step=000007.ckpt").unlink()  # killed at step 7: the newest checkpoint is of step 5, inside a window
    again = CSVLog(str(fit.run_dir / "split"))
    fit(parts(), steps=8, loggers=[again], ckpt_path=newest_valid(folder))
    resumed = table(fit.run_dir / "split" / "metrics.csv")
    assert deterministic(resumed) == deterministic(whole)


def test_operations_a_second_are_those_of_the_tokens_by_kind(fit: Any, memory: Any) -> None:
    log = StepLog(every=2)
    log.flops = {"text": 3e9, "prompt": 5e9, "vit": 7e9, "vae": 11e9}
    fit([log, LRPhases()], steps=4, loggers=[memory])
    rows = [metrics for _, metrics in memory.calls if "speed/tflops_per_s" in metrics]
    assert len(rows) == 2
    for row in rows:
        by_kind = {kind: row[f"tokens/{kind}"] for kind in log.flops}
        a_token = sum(by_kind[kind] * log.flops[kind] for kind in by_kind) / sum(by_kind.values())
        assert row["speed/tflops_per_s"] == pytest.approx(row["speed/tokens_per_s"] * a_token / 1e12)
    without = StepLog(every=2)
    fit([without, LRPhases()], steps=2, loggers=[memory])
    assert "speed/tflops_per_s" not in memory.calls[-1][1]


@pytest.mark.parametrize(("damage", "lost"), [("", 0), ("cut", 2), ("damaged", 1), ("gone", 3)])
def test_rows_that_are_lost_are_told_at_the_next_start(
    damage: str, lost: int, fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, path = fit.run_dir / "checkpoints", fit.run_dir / "log" / "metrics.csv"
    saving = StepCheckpoint(str(folder), every=7)
    fit([StepLog(every=2), LRPhases(), saving], steps=8, stop=7, loggers=[CSVLog(str(path.parent))])
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    if damage == "cut":
        path.write_text("".join(lines[:2]))
    elif damage == "damaged":
        path.write_text("".join([*lines[:2], "?\n", lines[3]]))
    elif damage == "gone":
        path.unlink()
    fit(
        [StepLog(every=2), LRPhases()],
        steps=8,
        loggers=[CSVLog(str(path.parent))],
        ckpt_path=newest_valid(folder),
    )
    told = [record.getMessage() for record in caplog.records if "rows are lost" in record.getMessage()]
    assert told == ([f"{path}: {lost} of 3 rows are lost, cut off or damaged"] if lost else [])


def test_csv_takes_new_columns_merges_a_step_and_drops_what_a_resume_repeats(tmp_path: Path) -> None:
    log = CSVLog(str(tmp_path))
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"b": 2.0}, step=1)
    log.log_metrics({"a": 3.0}, step=2)
    log.log_metrics({"c": 0.1}, step=2)
    log.log_metrics({"a": 4.0}, step=3)
    log = CSVLog(str(tmp_path))  # a new process, resumed at step 1
    log.log_metrics({"a": 30.0, "d": float("nan")}, step=2)
    assert table(tmp_path / "metrics.csv") == [
        {"step": "1", "a": "1", "b": "2", "c": "", "d": ""},
        {"step": "2", "a": "30", "b": "", "c": "", "d": "nan"},
    ]
    log.log_metrics({"b": 5.0}, step=2)
    log.log_metrics({"a": 6.0}, step=3)
    rows = table(tmp_path / "metrics.csv")
    assert [(row["step"], row["a"], row["b"]) for row in rows] == [("1", "1", "2"), ("2", "30", "5"), ("3", "6", "")]


def test_the_newest_value_of_every_metric_can_be_read_back(tmp_path: Path) -> None:
    log = CSVLog(str(tmp_path))
    log.log_metrics({"a": 1.5, "b": 2.0}, step=1)
    log.log_metrics({"a": 3.0}, step=2)
    assert last_values(tmp_path / "metrics.csv") == {"a": 3.0, "b": 2.0}
    assert last_values(tmp_path / "absent.csv") == {}


def test_csv_forgets_a_row_that_a_kill_cut_off(tmp_path: Path) -> None:
    log = CSVLog(str(tmp_path))
    for step in (1, 2):
        log.log_metrics({"a": step, "b": 10 * step}, step=step)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-3])
    CSVLog(str(tmp_path)).log_metrics({"a": 2, "b": 20}, step=2)
    assert [row["b"] for row in table(path)] == ["10", "20"]


def test_csv_loses_no_row_wherever_a_kill_comes(tmp_path: Path) -> None:
    """A process takes the table over, adds a row, a column, and to a row, and is killed before each of its lines in
    turn: the rows from before are there, and what a call of it came back from."""
    before, path, told = tmp_path / "before", tmp_path / "metrics.csv", tmp_path / "told"
    CSVLog(str(before)).log_metrics({"a": 1.0, "b": 123456.0}, step=1)
    CSVLog(str(before)).log_metrics({"a": 2.0}, step=2)

    def reset() -> None:
        shutil.copy(before / "metrics.csv", path)
        told.write_text("")

    def work() -> None:
        log = CSVLog(str(tmp_path))
        for step, metrics in ((2, {"b": 7.0}), (3, {"a": 3.0, "c": 123.0}), (3, {"c": 4.0})):
            log.log_metrics(metrics, step)
            told.write_text(f"{step}")

    count = 0
    for point in every_line(work, ("commit", "log_metrics", "_open", "_rewrite", "write", "_append"), reset):
        rows, count = read_rows(path), count + 1
        steps = [int(row["step"]) for row in rows]
        assert steps in ([1, 2], [1, 2, 3]), point
        assert steps[-1] >= int(told.read_text() or 0), point
        assert (rows[0]["a"], rows[0]["b"], rows[1]["a"]) == ("1", "123456", "2"), point
    assert count > 50
    assert table(path)[-1] == {"step": "3", "a": "3", "b": "", "c": "4"}


def test_tensorboard_gets_every_metric(fit: Any, memory: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(str(fit.run_dir), name="tensorboard", version="")
    fit([StepLog(every=1), RoutingMonitor(every=1), LRPhases()], steps=2, loggers=[memory, board])
    events = EventAccumulator(str(fit.run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected = set(memory.rows()[2])
    assert expected <= set(events.Tags()["scalars"])
    last = events.Scalars("train/ce")[-1]
    assert (last.step, last.value) == (2, pytest.approx(memory.rows()[2]["train/ce"], rel=1e-6))


def test_two_ranks_log_what_one_process_logs(fit: Any) -> None:
    """The same micro-batches, shared out: the counts are equal, the losses up to rounding."""
    for devices, name in ((1, "one"), (2, "two")):
        parts = [StepLog(every=2), RoutingMonitor(every=2), LRPhases()]
        fit(parts, steps=2, micro_batches=2, devices=devices, loggers=[CSVLog(str(fit.run_dir / name))])
    one, two = (table(fit.run_dir / name / "metrics.csv")[0] for name in ("one", "two"))
    assert set(one) == set(two)
    for name in (n for n in one if not n.startswith(CLOCK)):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=2e-3, abs=1e-6), name


def test_samples_of_a_packed_batch() -> None:
    assert float(num_samples(random_batch(count=7))) == 7.0
    empty = random_batch(count=2)
    empty.segment.fill_(-1)
    assert float(num_samples(empty)) == 0.0


def test_norms_of_a_frozen_role_are_those_before_it_is_dropped(fit: Any, memory: Any) -> None:
    phases = [Phase("still", 2, frozen=("gen",))]
    fit([StepLog(every=1), LRPhases()], steps=2, loggers=[memory], phases=phases)
    assert memory.rows()[1]["grad_norm/gen"] > 0
    torch.testing.assert_close(memory.rows()[1]["phase/shield"], 0.0)


def test_a_window_of_two_ranks_is_not_counted_twice_after_a_resume(fit: Any) -> None:
    """Saved are the totals of all ranks; only one of them takes these back."""
    folder, whole, tail = fit.run_dir / "checkpoints", CSVLog(str(fit.run_dir / "a")), CSVLog(str(fit.run_dir / "b"))
    parts = [StepLog(every=4), RoutingMonitor(every=4), LRPhases()]
    fit(parts, steps=4, micro_batches=2, devices=2, loggers=[whole])
    fit([*parts, StepCheckpoint(str(folder), every=2)], steps=4, stop=2, micro_batches=2, devices=2)
    fit(parts, steps=4, micro_batches=2, devices=2, loggers=[tail], ckpt_path=newest_valid(folder))
    rows = [
        {n: float(v) for n, v in read_rows(log.path)[-1].items() if not n.startswith("speed/")} for log in (whole, tail)
    ]
    assert rows[1] == pytest.approx(rows[0], rel=1e-6)
    assert rows[0]["tokens/vae"] > 0
