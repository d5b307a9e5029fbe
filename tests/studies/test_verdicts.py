"""Verdicts from numbers of made-up arms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from symbiotic.studies.statistics import Answers, Comparison, Seeds
from symbiotic.studies.study import Hypothesis, Study
from symbiotic.studies.verdicts import Verdict, decide, differences, forgetting, interference, synergy, verdicts


@dataclass
class Made:
    name: str
    numbers: dict[str, dict[int, float]] = field(default_factory=dict)
    anchors: dict[str, dict[int, float]] = field(default_factory=dict)
    control: str | None = None
    intervened: tuple[int, ...] = ()
    right: dict[int, dict[str, float]] = field(default_factory=dict)

    def values(self, score: str, step: int | None = None) -> Seeds:
        return self.numbers.get(score if step is None else f"{score}@{step}", {})

    def anchor(self, name: str, score: str, step: int | None = None) -> Seeds:
        return self.anchors.get(name, {})

    def answers(self, score: str, step: int | None = None) -> Answers:
        return self.right


def claim(expect: Any = "higher", margin: float = 0.0, **changes: Any) -> Hypothesis:
    given = {"claim": "it is so", "metric": "reading", "arm": "a", "against": "b", "expect": expect, "margin": margin}
    return Hypothesis(**(given | changes))


def judged(arms: list[Made], *hypotheses: Hypothesis, **changes: Any) -> list[Verdict]:
    return verdicts(Study(hypotheses=hypotheses, **changes), arms)


@pytest.mark.parametrize(
    ("expect", "margin", "interval", "status"),
    [
        ("higher", 0.0, (0.01, 0.05), "supported"),
        ("higher", 0.02, (0.01, 0.05), "undecided"),
        ("higher", 0.02, (0.03, 0.05), "supported"),
        ("higher", 0.02, (-0.01, 0.015), "not supported"),  # too small an effect, whatever its sign
        ("higher", 0.0, (-0.05, -0.01), "not supported"),
        ("higher", 0.0, (-0.05, 0.01), "undecided"),
        ("lower", 0.0, (-0.05, -0.01), "supported"),
        ("lower", 0.02, (-0.05, -0.03), "supported"),
        ("lower", 0.02, (-0.015, 0.4), "not supported"),
        ("lower", 0.0, (0.01, 0.05), "not supported"),
        ("lower", 0.02, (-0.05, 0.0), "undecided"),
        ("equal", 0.02, (-0.01, 0.015), "supported"),
        ("equal", 0.02, (-0.01, 0.03), "undecided"),
        ("equal", 0.02, (0.03, 0.05), "not supported"),
        ("equal", 0.02, (-0.05, -0.03), "not supported"),
        ("higher", 0.0, None, "undecided"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(expect: str, margin: float, interval: Any, status: str) -> None:
    assert decide(claim(expect, margin), interval) == status


def test_a_line_says_all_of_it() -> None:
    a, b = (
        Made("a", {"reading": {0: 0.91, 1: 0.93, 2: 0.95}}),
        Made("b", {"reading": {0: 0.80, 1: 0.83, 2: 0.83, 3: 1}}),
    )
    (found,) = judged([a, b], claim(margin=0.02))
    assert found.status == "supported"
    assert found.line == (
        "it is so: reading of a against b +0.1100 [+0.0852, +0.1348], 3 seeds, margin 0.02, p 0.004, Holm 0.004"
    )
    (found,) = judged([a, b], claim("lower"))
    assert found.status == "not supported"
    (found,) = judged([b, a], claim("lower", arm="b", against="a"))
    assert (found.status, "b against a −0.1100 [−0.1348, −0.0852]" in found.line) == ("supported", True)


def test_one_seed_decides_nothing() -> None:
    (found,) = judged([Made("a", {"reading": {0: 0.9}}), Made("b", {"reading": {0: 0.1}})], claim())
    assert (found.status, found.p, found.holm) == ("undecided", None, None)
    assert found.line == "it is so: reading of a against b +0.8000 (one seed, so no interval)"


def test_equal_differences_decide_nothing() -> None:
    arms = [Made("a", {"reading": {0: 1.0, 1: 1.0}}), Made("b", {"reading": {0: 1.0, 1: 1.0}})]
    (found,) = judged(arms, claim("equal", 0.1))
    assert found.status == "undecided"
    assert found.line.endswith("+0.0000 (the same in all 2 seeds, so no interval, margin 0.1)")


def test_what_was_not_measured_is_undecided() -> None:
    arms = [Made("a", {"reading": {0: 1.0}}), Made("b")]
    for hypothesis in (claim(), claim(arm="nobody"), claim(against="control"), claim(against="stage 0")):
        (found,) = judged(arms, hypothesis)
        assert (found.status, found.comparison) == ("undecided", None)
        assert found.line.endswith("was not measured: no seed has both")


def test_anchors_controls_and_steps() -> None:
    a = Made(
        "a",
        {"reading": {0: 0.5, 1: 0.6}, "reading@150": {0: 0.9, 1: 0.8}},
        {"stage 0": {0: 0.9, 1: 0.9}, "iteration 0": {0: 0.1, 1: 0.1}},
        control="c",
        intervened=(1,),
    )
    arms = [a, Made("c", {"reading": {0: 0.4, 1: 0.55}, "reading@150": {0: 0.2, 1: 0.3}})]
    against = ("stage 0", "iteration 0", "control", "c")
    found = judged(arms, *(claim(against=name) for name in against), claim(against="c", step=150))
    means = [one.comparison.mean for one in found if one.comparison is not None]
    assert means == pytest.approx([-0.35, 0.45, 0.075, 0.075, 0.6])
    assert "of a against its control c +" in found[2].line
    assert "of a against c at step 150 +" in found[4].line
    assert all(one.line.endswith("; the collapse alarm changed a") for one in found)
    (found[0],) = judged(arms, claim(against="c"), step=150)
    assert found[0].comparison is not None
    assert found[0].comparison.mean == pytest.approx(0.6)


def test_a_control_that_its_alarm_changed_is_named() -> None:
    arms = [Made("a", {"reading": {0: 0.5}}, control="c"), Made("c", {"reading": {0: 0.4}}, intervened=(0,))]
    for found in judged(arms, claim(against="control"), claim(against="c")):
        assert found.line.endswith("; the collapse alarm changed c")


def test_holm_runs_over_the_hypotheses_that_have_a_p() -> None:
    a, b = Made("a", {"reading": {0: 0.91, 1: 0.93, 2: 0.95}}), Made("b", {"reading": {0: 0.80, 1: 0.83, 2: 0.83}})
    found = judged([a, b], claim(), claim("lower"), claim(metric="embedded_acc"))
    assert found[0].p is not None
    assert [one.holm for one in found] == [pytest.approx(2 * found[0].p), pytest.approx(2 * found[0].p), None]


def test_differences_forgetting_interference() -> None:
    right = {0: {"q1": 1.0, "q2": 0.0}, 1: {"q1": 1.0, "q2": 1.0}}
    wrong = {0: {"q1": 0.0, "q2": 0.0}, 1: {"q1": 0.0, "q2": 1.0}}
    a = Made("a", {"reading": {0: 0.5, 1: 1.0}}, {"stage 0": {0: 1.0, 1: 1.0}}, "b", right=right)
    arms = [a, Made("b", {"reading": {0: 0.0, 1: 0.5}, "flow_error": {0: 1.0}}, right=wrong)]
    found = differences(arms, "b", ["reading", "flow_error"])
    assert set(found) == {("a", "reading")}
    assert (found["a", "reading"].mean, found["a", "reading"].p) == (0.5, 1.0)
    assert forgetting(arms, ["reading"]).keys() == {("a", "reading")}
    assert forgetting(arms, ["reading"])["a", "reading"].mean == -0.25
    assert interference(arms, ["reading"]) == found


def test_synergy_is_an_interval_on_the_better_side() -> None:
    up, down, unsure = (Comparison(0.0, 3, t=t) for t in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1)))
    assert synergy(up, "reading")
    assert not synergy(down, "reading")
    assert synergy(down, "flow_error")
    assert not synergy(unsure, "reading")
    assert not synergy(Comparison(0.5, 1), "reading")
