"""What a study found: differences between arms, forgetting, interference, and one verdict per hypothesis.

A hypothesis says that `arm - against` lies beyond a margin, in the expected direction. With the 95 % t interval over
seeds, turned so that the expected direction is up:

    higher, lower   supported       the whole interval lies above the margin
                    not supported   the whole interval lies below the margin (also: the other direction)
    equal           supported       the whole interval lies between -margin and +margin
                    not supported   the whole interval lies outside, on either side
    undecided       anything else; one seed, or equal differences in all seeds, have no interval and decide nothing

The p beside a verdict is below 0.05 exactly where the interval excludes the margin (see `p_beyond`); Holm's adjustment
over the hypotheses of the study stands beside it, and does not change the verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from symbiotic.evaluation.names import METRICS, STEPS_TO, metric
from symbiotic.studies import attribution
from symbiotic.studies.statistics import (
    Answers,
    Comparison,
    Interval,
    Seeds,
    by_question,
    compare,
    holm,
    p_beyond,
    paired,
)
from symbiotic.studies.study import CONTROL, ITERATION0, STAGE0, Hypothesis, Study

Status = Literal["supported", "not supported", "undecided"]


class Scored(Protocol):
    """An arm with its numbers by seed. control: the name of its understanding-only control."""

    @property
    def name(self) -> str: ...

    @property
    def control(self) -> str | None: ...

    @property
    def intervened(self) -> Sequence[int]: ...

    def values(self, score: str, step: int | None = None) -> Seeds: ...

    def anchor(self, name: str, score: str, step: int | None = None) -> Seeds: ...

    def answers(self, score: str, step: int | None = None) -> Answers: ...


@dataclass(frozen=True)
class Verdict:
    """p, holm: raw and adjusted; None where there is no interval. line: all of it in words, the status aside."""

    hypothesis: Hypothesis
    status: Status
    comparison: Comparison | None
    p: float | None
    holm: float | None
    line: str


# --------------------------------------------------------------------------- differences


def difference(first: Scored, second: Scored, score: str, step: int | None = None) -> Comparison | None:
    """first - second, paired by seed, with the test question by question where the score has records."""
    values = first.values(score, step), second.values(score, step)
    if not metric(score).share or not all(values):
        return compare(*values)
    return compare(*values, by_question(first.answers(score, step), second.answers(score, step)))


def differences(
    arms: Sequence[Scored], reference: str, scores: Iterable[str], step: int | None = None
) -> dict[tuple[str, str], Comparison]:
    """(arm, score) -> against the reference arm."""
    named = {arm.name: arm for arm in arms}
    pairs = [(arm, score) for score in scores for arm in arms if arm.name != reference]
    found = {(arm.name, score): difference(arm, named[reference], score, step) for arm, score in pairs}
    return {key: value for key, value in found.items() if value is not None}


def forgetting(
    arms: Sequence[Scored], scores: Iterable[str], step: int | None = None
) -> dict[tuple[str, str], Comparison]:
    """(arm, score) -> against stage 0, the parent of the same seed."""
    pairs = [(arm, score) for score in scores for arm in arms]
    found = {(a.name, score): compare(a.values(score, step), a.anchor(STAGE0, score, step)) for a, score in pairs}
    return {key: value for key, value in found.items() if value is not None}


def interference(
    arms: Sequence[Scored], scores: Iterable[str], step: int | None = None
) -> dict[tuple[str, str], Comparison]:
    """(arm, score) -> against its control, for the arms that have one. Better than it beyond chance: synergy."""
    named = {arm.name: arm for arm in arms}
    pairs = [(arm, named[arm.control], score) for score in scores for arm in arms if arm.control in named]
    found = {(arm.name, score): difference(arm, control, score, step) for arm, control, score in pairs}
    return {key: value for key, value in found.items() if value is not None}


def synergy(found: Comparison, score: str) -> bool:
    """Whether an interference interval lies wholly on the better side of 0."""
    if found.t is None:
        return False
    return found.t[0] > 0 if metric(score).better == "higher" else found.t[1] < 0


# --------------------------------------------------------------------------- verdicts


def decide(hypothesis: Hypothesis, interval: Interval | None) -> Status:
    """interval: of arm - against, 95 %."""
    if interval is None:
        return "undecided"
    low, high = interval
    if hypothesis.expect == "lower":
        low, high = -high, -low
    margin = hypothesis.margin
    if hypothesis.expect == "equal":
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
    else:
        inside, outside = low > margin, high < margin
    return "supported" if inside else "not supported" if outside else "undecided"


def verdicts(study: Study, arms: Sequence[Scored]) -> list[Verdict]:
    """One per hypothesis, in their order."""
    named = {arm.name: arm for arm in arms}
    found = [verdict(hypothesis, named, study) for hypothesis in study.hypotheses]
    adjusted = holm([one.p for one in found])
    return [
        replace(one, holm=p, line=worded(replace(one, holm=p), named)) for one, p in zip(found, adjusted, strict=True)
    ]


def verdict(hypothesis: Hypothesis, arms: Mapping[str, Scored], study: Study) -> Verdict:
    """Without Holm's adjustment and without words."""
    pair = two_sides(hypothesis, arms, study)
    found = compare(*pair) if pair is not None else None
    status = decide(hypothesis, found.t if found is not None else None)
    p = None
    if pair is not None and found is not None and found.t is not None:
        margins = (
            (-hypothesis.margin, hypothesis.margin) if hypothesis.expect == "equal" else (signed_margin(hypothesis),)
        )
        p = p_beyond(list(paired(*pair).values()), margins)
    return Verdict(hypothesis, status, found, p, None, "")


def signed_margin(hypothesis: Hypothesis) -> float:
    return -hypothesis.margin if hypothesis.expect == "lower" else hypothesis.margin


def two_sides(hypothesis: Hypothesis, arms: Mapping[str, Scored], study: Study) -> tuple[Seeds, Seeds] | None:
    """Values of the arm and of what it is held against, or of the arms that tell an effect; None where either is not
    there."""
    arm, at = arms.get(hypothesis.arm), study.step if hypothesis.step is None else hypothesis.step
    if hypothesis.effect:
        every = {name: one.values(hypothesis.metric, at) for name, one in arms.items() if name in study.levels}
        changes = attribution.named(hypothesis.effect, {f: list(levels) for f, levels in study.design.items()})
        groups, first, second = attribution.sides(study.levels, every, changes or ())
        return (first, second) if groups else None
    if arm is None:
        return None
    values = arm.values(hypothesis.metric, at)
    if hypothesis.against in (STAGE0, ITERATION0):
        return values, arm.anchor(hypothesis.against, hypothesis.metric, at)
    other = other_arm(hypothesis, arms)
    return None if other is None else (values, other.values(hypothesis.metric, at))


def other_arm(hypothesis: Hypothesis, arms: Mapping[str, Scored]) -> Scored | None:
    """That the arm is held against, or its control; None for an anchor, and where it is not there."""
    arm = arms.get(hypothesis.arm)
    control = arm.control if arm is not None else None
    return arms.get(str(control if hypothesis.against == CONTROL else hypothesis.against))


# --------------------------------------------------------------------------- words


def worded(found: Verdict, arms: Mapping[str, Scored]) -> str:
    """`claim: score of A against B +0.031 [+0.005, +0.057], 3 seeds, p 0.03, Holm 0.12`."""
    h = found.hypothesis
    where = f" at step {h.step}" if h.step is not None else ""
    compared = f"{title(h.metric)} of {h.arm} against {opponent(h, arms)}{where}"
    compared = f"{title(h.metric)}, effect of {h.effect}{where}" if h.effect else compared
    marked = [arm for arm in (arms.get(h.arm), other_arm(h, arms)) if arm is not None and arm.intervened]
    note = f"; the collapse alarm changed {' and '.join(arm.name for arm in marked)}" if marked else ""
    return f"{h.claim}: {compared} {measured(found)}{note}"


def opponent(hypothesis: Hypothesis, arms: Mapping[str, Scored]) -> str:
    arm = arms.get(hypothesis.arm)
    named = f" {arm.control}" if hypothesis.against == CONTROL and arm is not None and arm.control else ""
    return (
        f"its {hypothesis.against}{named}"
        if hypothesis.against in (STAGE0, ITERATION0, CONTROL)
        else hypothesis.against
    )


def measured(found: Verdict) -> str:
    """The difference with its interval and tests, or why there is none."""
    h, made = found.hypothesis, found.comparison
    if made is None:
        return "was not measured: no seed has both"
    digits = metric(h.metric).digits + 1
    mean, margin = f"{made.mean:+.{digits}f}", f", margin {h.margin:g}" if h.margin else ""
    if made.t is None:
        why = "one seed, so no interval" if made.n == 1 else f"the same in all {made.n} seeds, so no interval"
        return f"{mean} ({why}{margin})".replace("-", "−")
    low, high = (f"{side:+.{digits}f}" for side in made.t)
    tests = f", p {small(found.p)}, Holm {small(found.holm)}" if found.p is not None else ""
    return f"{mean} [{low}, {high}]".replace("-", "−") + f", {made.n} seeds{margin}{tests}"


def title(name: str) -> str:
    return metric(name).title if name in METRICS or name.startswith(STEPS_TO) else name


def small(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
