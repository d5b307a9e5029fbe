"""Phases that end by a metric: where they end, what is recorded, and that a resumed run agrees."""

from __future__ import annotations

from typing import Any

import pytest

from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.callbacks.events import read_events, record_event, rewind_events
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.log import StepLog
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.phase_transitions import PhaseTransitions
from symbiotic.schema import Condition, ConfigError, Phase

ALWAYS = Condition("train/ce", above=0.0)


def phases(when: Condition, until: int = 6) -> list[Phase]:
    return [Phase("shield", until, shield=1.0, when=when), Phase("joint", 8, shield=0.5, rate={"gen": 0.1})]


def callbacks(every: int = 1) -> list[Any]:
    return [GradientShielding(), StepLog(every), LRPhases(), PhaseTransitions()]


def levels(memory: Any) -> list[float]:
    return [row["phase/shield"] for _, row in sorted(memory.rows().items())]


def test_a_phase_ends_when_its_condition_held_so_many_logs_in_a_row(fit: Any, memory: Any) -> None:
    when = Condition("train/ce", above=0.0, logs=3)
    _, module = fit(callbacks(), steps=8, phases=phases(when), loggers=[memory])
    assert module.transitions == {0: 3}
    assert levels(memory) == [1.0] * 3 + [0.5] * 5
    rates = [row["lr/gen"] for _, row in sorted(memory.rows().items())]
    assert rates[2] == pytest.approx(0.01)
    assert rates[3] == pytest.approx(0.001)
    (event,) = read_events(fit.run_dir)
    assert (event["step"], event["kind"], event["phase"]) == (3, "phase", "shield")
    assert "train/ce" in event["text"]


def test_without_its_condition_a_phase_goes_on_to_its_last_step(fit: Any, memory: Any) -> None:
    _, module = fit(callbacks(), steps=8, phases=phases(Condition("train/ce", below=0.0), 5), loggers=[memory])
    assert module.transitions == {}
    assert levels(memory) == [1.0] * 5 + [0.5] * 3
    assert "did not hold" in read_events(fit.run_dir)[0]["text"]


def test_only_logged_steps_count(fit: Any) -> None:
    _, module = fit(callbacks(every=2), steps=8, phases=phases(Condition("train/ce", above=0.0, logs=2)))
    assert module.transitions == {0: 4}


def test_a_metric_that_is_never_logged_is_an_error_at_the_phase_s_last_step(fit: Any) -> None:
    with pytest.raises(ConfigError, match=r"phases\.list\[0\]\.when\.metric=eval/nothing: was never logged"):
        fit(callbacks(), steps=8, phases=phases(Condition("eval/nothing", above=0.0), 4))


def test_a_misspelt_metric_is_an_error_at_the_first_log(fit: Any) -> None:
    with pytest.raises(ConfigError, match=r"train/cee: is not logged; did you mean 'train/ce'"):
        fit(callbacks(), steps=8, phases=phases(Condition("train/cee", above=0.0), 6))


def test_a_condition_that_holds_only_at_the_last_step_is_recorded_as_such(fit: Any) -> None:
    fit(callbacks(every=4), steps=8, phases=phases(Condition("train/ce", above=0.0), 4))
    assert "held there" in read_events(fit.run_dir)[0]["text"]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resume_keeps_the_count_and_the_transition(fit: Any, memory: Any, stop: int) -> None:
    """Stopped in the middle of the three logs, and after the transition."""
    when, folder = Condition("train/ce", above=0.0, logs=3), fit.run_dir / "checkpoints"
    fit([*callbacks(), StepCheckpoint(str(folder), every=1)], steps=8, stop=stop, phases=phases(when))
    _, module = fit(callbacks(), steps=8, phases=phases(when), ckpt_path=newest_valid(folder), loggers=[memory])
    assert module.transitions == {0: 3}
    assert levels(memory) == ([1.0] * 3 + [0.5] * 5)[stop:]


def test_all_ranks_take_the_transition(fit: Any) -> None:
    """With two processes, accumulating: the event is recorded once, and the end is that of one process."""
    fit(callbacks(), steps=8, phases=phases(ALWAYS), micro_batches=4, devices=2)
    assert [event["step"] for event in read_events(fit.run_dir)] == [1]


def test_the_record_forgets_what_happened_after_the_step_of_a_resume(fit: Any, tmp_path: Any) -> None:
    trainer, _ = fit([], steps=1)
    for step in (2, 5, 9):
        record_event(trainer, step, "alarm", f"at {step}", layer=1)
    rewind_events(fit.run_dir, 5)
    assert [event["step"] for event in read_events(fit.run_dir)] == [2, 5]
    with (fit.run_dir / "events.jsonl").open("a") as file:
        file.write('{"step": 6, "ki')  # a kill
    assert len(read_events(fit.run_dir)) == 2
    rewind_events(tmp_path / "new", 0)
    assert (tmp_path / "new" / "events.jsonl").read_text() == ""
