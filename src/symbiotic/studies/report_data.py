"""What a report is made from: runs with their scores, arms, anchors, and how arms compare. No file is written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from symbiotic.callbacks.in_loop_evaluation import SCORES, read_scores
from symbiotic.evaluation.names import metric
from symbiotic.studies.curves import Series, read_score_series, read_series
from symbiotic.studies.report_style import Look

Seeds = dict[int, float]
"""Seed -> value."""


@dataclass(frozen=True)
class RunData:
    """A run and its evaluation. results: what `studies/evaluate.py` wrote, {} where the run was not evaluated."""

    folder: Path
    seed: int
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    results: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Path | None = None

    @cached_property
    def series(self) -> dict[str, Series]:
        """Scores over the steps; the evaluation's own at its step."""
        found = {name.removeprefix("eval/"): s for name, s in read_score_series(self.folder / SCORES).items()}
        step = self.results.get("step")
        for name, score in self.results.get("scores", {}).items():
            if step is not None and score["value"] is not None:
                steps, values = found.setdefault(name, ([], []))
                if step in steps:
                    values[steps.index(step)] = score["value"]
                else:
                    steps.append(step)
                    values.append(score["value"])
        return found

    @property
    def in_loop(self) -> list[tuple[int, str, float | None]]:
        """Step, score and value of what was measured while it trained."""
        found = sorted(read_scores(self.folder / SCORES).items())
        return [(step, name, value) for step, scores in found for name, value in scores.items()]

    @cached_property
    def metrics(self) -> dict[str, Series]:
        path = self.folder / "metrics.csv"
        return read_series(path) if path.exists() else {}

    def score(self, name: str, step: int | None = None) -> float | None:
        """At a step; None: the last one, evaluated where it was, else as the training measured it."""
        steps, values = self.series.get(name, ((), ()))
        found = dict(zip(steps, values, strict=True))
        return found.get(self.summary["steps"] if step is None else step)

    def samples(self, name: str) -> int | None:
        found = self.results.get("scores", {}).get(name, {}).get("n", self.summary.get("n", {}).get(name))
        return None if found is None else int(found)


@dataclass(frozen=True)
class ArmData:
    """Runs that differ in the seed only.

    Args:
        control: the name of the arm that is this one without generation. of: the arms whose control this is.
        generates: whether it was trained to make images; image scores of one that was not mean nothing.
    """

    name: str
    runs: Sequence[RunData]
    look: Look
    control: str | None = None
    of: Sequence[str] = ()
    generates: bool = True

    @property
    def intervened(self) -> list[int]:
        """Seeds in which a collapse alarm changed the training."""
        return [run.seed for run in self.runs if run.summary.get("events", {}).get("intervention")]

    def values(self, score: str, step: int | None = None) -> Seeds:
        if not self.generates and metric(score).side == "generation":
            return {}
        found = {run.seed: run.score(score, step) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def anchor(self, name: str, score: str) -> Seeds:
        """`stage 0` or `iteration 0`."""
        found = {run.seed: run.summary["anchors"].get(name, {}).get(score) for run in self.runs}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def samples(self, score: str) -> set[int]:
        return {n for run in self.runs if (n := run.samples(score)) is not None}


@dataclass(frozen=True)
class Comparison:
    """Difference of two arms, paired by seed; intervals 95 %, None with one seed.

    p: of the paired test question by question, None for scores that are no share of right answers.
    """

    mean: float
    n: int
    t: tuple[float, float] | None = None
    bootstrap: tuple[float, float] | None = None
    p: float | None = None

    @property
    def sure(self) -> bool:
        """Whether the t interval excludes 0."""
        return self.t is not None and (self.t[0] > 0 or self.t[1] < 0)


Pair = tuple[str, str]
"""Arm and score."""

Compare = Callable[[Seeds, Seeds], Comparison | None]
"""First - second over the seeds that both have; None where there is none."""


def against(
    arms: Sequence[ArmData], other: Callable[[ArmData, str], Seeds], compare: Compare, step: int | None = None
) -> dict[Pair, Comparison]:
    """Every score of every arm against what `other` gives for it."""
    scores = dict.fromkeys(name for arm in arms for run in arm.runs for name in run.series)
    pairs = ((arm, score) for arm in arms for score in scores)
    found = {(arm.name, score): compare(arm.values(score, step), other(arm, score)) for arm, score in pairs}
    return {pair: comparison for pair, comparison in found.items() if comparison is not None}


@dataclass(frozen=True)
class StudyData:
    """A study with its numbers; arms in the order in which the study declares them.

    Args:
        step: which step the numbers are of; None: the last.
        differences, forgetting, interference: (arm, score) -> against the reference, stage 0, and the control.
        verdicts: (status, line) of each hypothesis.
        problems: lines about the study as a whole: missing cells, runs left out.
    """

    name: str
    question: str
    reference: str
    arms: Sequence[ArmData]
    step: int | None = None
    differences: Mapping[Pair, Comparison] = field(default_factory=dict)
    forgetting: Mapping[Pair, Comparison] = field(default_factory=dict)
    interference: Mapping[Pair, Comparison] = field(default_factory=dict)
    verdicts: Sequence[tuple[str, str]] = ()
    problems: Sequence[str] = ()

    @property
    def runs(self) -> list[RunData]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def paired(self) -> bool:
        """Whether any arm has more than one seed, without which there is no interval and no verdict."""
        return any(len(arm.runs) > 1 for arm in self.arms)
