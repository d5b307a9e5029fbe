"""What a report is made from: arms with their numbers, and how they compare. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from symbiotic.evaluation.names import METRICS, STEPS_TO, is_variant, metric
from symbiotic.studies.attribution import Levels
from symbiotic.studies.audit import Arm, Audit
from symbiotic.studies.curves import Series
from symbiotic.studies.report_style import Look
from symbiotic.studies.runs_of import Run
from symbiotic.studies.statistics import Comparison, Interval, resampling_interval
from symbiotic.studies.verdicts import Verdict, differences, forgetting, interference, verdicts

Pair = tuple[str, str]
"""Arm and score."""


@dataclass(frozen=True)
class ArmData(Arm):
    """An arm and how the figures draw it. of: the arms whose control it is."""

    look: Look = field(default_factory=lambda: Look(0))
    of: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """In figures: marked where an alarm changed the training."""
        return f"{self.name} ⚠" if self.intervened else self.name

    @cached_property
    def scores(self) -> dict[str, list[Series]]:
        """Score -> its values over the steps, one series a run; the last value is that of the evaluation."""
        measured = {run.seed: {name for step in run.steps for name in run.names(step)} for run in self.runs}
        names = dict.fromkeys(name for run in self.runs for step in run.steps for name in run.names(step))
        return {
            name: [series(run, name) for run in self.runs if name in measured[run.seed]]
            for name in names
            if self.has(name)
        }

    def samples(self, score: str, step: int | None = None) -> set[int]:
        """How many the score rests on; more than one number where runs differ."""
        return {n for run in self.runs if (n := run.samples(score, step)) is not None}

    def resampled(self, score: str, step: int | None = None) -> Interval | None:
        """Of the mean over its seeds, from the benchmark's own interval in each: for a score that is no mean."""
        seeds = self.values(score, step)
        found = [run.evaluated(score, step) for run in self.runs if run.seed in seeds]
        triples = [(one["value"], one["low"], one["high"]) for one in found if one]
        known = [triple for triple in triples if None not in triple]
        return resampling_interval(known) if len(known) == len(seeds) else None


@dataclass(frozen=True)
class StudyData:
    """A study with its numbers; arms in the order in which the study declares them.

    Args:
        step: which step the numbers are of; None: the last.
        differences, forgetting, interference: (arm, score) -> against the reference, stage 0, and the control.
        design: factor -> its levels. levels: arm -> factor -> level, for the arms of the design.
        speeds: names of scores that are steps to a target.
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
    verdicts: Sequence[Verdict] = ()
    design: Mapping[str, Sequence[str]] = field(default_factory=dict)
    levels: Levels = field(default_factory=dict)
    speeds: Sequence[str] = ()
    problems: Sequence[str] = ()

    @classmethod
    def of(cls, audit: Audit) -> StudyData:
        """The study's numbers, from the runs that passed the audit."""
        study, arms = audit.study, looked(audit)
        names = dict.fromkeys(name for arm in arms for name in arm.scores if not is_part(name) and not is_variant(name))
        understanding = [name for name in names if metric(name).side == "understanding"]
        return cls(
            name=study.name,
            question=study.question or "How do these runs compare?",
            reference=str(study.reference),
            arms=arms,
            step=study.step,
            differences=differences(arms, str(study.reference), names, study.step),
            forgetting=forgetting(arms, understanding, study.step),
            interference=interference(arms, understanding, study.step),
            verdicts=verdicts(study, arms),
            design={factor: list(levels) for factor, levels in study.design.items()},
            levels=study.levels,
            speeds=[f"{STEPS_TO}{score}@{target:g}" for score, target in study.targets.items()],
            problems=audit.problems,
        )

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})


def looked(audit: Audit) -> list[ArmData]:
    """Each arm with its colour and marker; a control has those of its (first) arm."""
    owners: dict[str, list[str]] = {}
    for name, control in audit.controls.items():
        owners.setdefault(control, []).append(name)
    numbers = {arm.name: n for n, arm in enumerate(arm for arm in audit.arms if arm.name not in owners)}
    made = []
    for arm in audit.arms:
        of = tuple(owners.get(arm.name, ()))
        look = Look(numbers[of[0]], control=True) if of else Look(numbers[arm.name])
        made.append(ArmData(arm.name, arm.runs, arm.control, arm.generates, look, of))
    return made


def is_part(score: str) -> bool:
    """Of a benchmark: `mmlu/anatomy`."""
    return "/" in score and score not in METRICS and not score.startswith(STEPS_TO) and not is_variant(score)


def series(run: Run, name: str) -> Series:
    """A score over the steps, as `Run.score` gives it."""
    found = ((step, run.score(name, step)) for step in run.steps)
    known = [(step, value) for step, value in found if value is not None]
    return [step for step, _ in known], [value for _, value in known]
