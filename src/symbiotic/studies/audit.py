"""Before any number is compared: which runs enter a study, what they were made of, and in what their arms differ.

`audit_runs` refuses, with one line that names runs and keys: results of different code, data, versions, parents, sample
counts or protocols; an undeclared difference between arms; a cell with two runs. What is merely absent (runs that are
unfinished, stopped by their alarm, missing, without provenance, or of no arm) is a line in `problems`, never dropped in
silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from symbiotic.evaluation.names import metric
from symbiotic.schema import Config, ConfigError, parse
from symbiotic.studies.audit_notes import notes
from symbiotic.studies.budget import Budget, budget, overhead
from symbiotic.studies.cells import absent, by_arm, completed, one_per_cell, readable_runs
from symbiotic.studies.runs_of import MISSING, AuditError, Run, config_keys, listed, plain, text
from symbiotic.studies.sameness import attach_results, check_provenance, check_results, shared_facts
from symbiotic.studies.statistics import Answers, Seeds
from symbiotic.studies.study import Study, covers, find_controls, set_by_ablations, without_generation
from symbiotic.studies.written import as_written

GROUPS = {
    "architecture": ("system", "model"),
    "optimisation": (
        "rates",
        "objective",
        "surgery",
        "lora",
        "trainer",
        "compile",
        "recompute",
        "callbacks",
        "log_every",
    ),
    "schedule": ("phases", "init"),
    "data": ("data", "mix"),
    "evaluation": ("evaluation",),
}
"""Of the config's keys; what is in none is `other`."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed only, in the order of their seeds.

    Args:
        control: the arm that is this one without generation. generates: whether it was trained to make images; image
            scores of one that was not mean nothing.
    """

    name: str
    runs: tuple[Run, ...]
    control: str | None = None
    generates: bool = True

    @property
    def intervened(self) -> list[int]:
        """Seeds in which a collapse alarm changed the training."""
        return [run.seed for run in self.runs if run.summary.get("events", {}).get("intervention")]

    @property
    def changed(self) -> dict[int, list[str]]:
        """Seed -> settings, or code, that were changed after the run had begun."""
        keys = {run.seed: [change["key"] for change in run.summary.get("changes", ())] for run in self.runs}
        return {seed: list(dict.fromkeys(found)) for seed, found in keys.items() if found}

    @property
    def skipped(self) -> dict[int, int]:
        """Seed -> steps that were left out, as their loss or gradient was not finite."""
        counts = {run.seed: run.summary.get("events", {}).get("skipped", 0) for run in self.runs}
        return {seed: count for seed, count in counts.items() if count}

    def has(self, score: str) -> bool:
        """Whether a score of its runs means anything."""
        return self.generates or score.startswith("routing/") or metric(score).side != "generation"

    def values(self, score: str, step: int | None = None) -> Seeds:
        found = {run.seed: run.score(score, step) for run in self.runs if self.has(score)}
        return {seed: value for seed, value in found.items() if value is not None}

    def anchor(self, name: str, score: str, step: int | None = None) -> Seeds:
        """`stage 0` or `iteration 0`, measured like the values at a step."""
        found = {run.seed: run.anchor(name, score, step).get("value") for run in self.runs}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def answers(self, score: str, step: int | None = None) -> Answers:
        found = {run.seed: run.answers(score, step) for run in self.runs}
        return {seed: answers for seed, answers in found.items() if answers}


@dataclass(frozen=True)
class KeyDifference:
    """A config key that is not the same in all arms. values: arm -> its value, as text (of several, by ` | `).

    factor: the declared one that covers it.
    """

    key: str
    group: str
    values: Mapping[str, str]
    factor: str


@dataclass(frozen=True)
class Audit:
    """
    Args:
        study: with its arms, seeds and reference filled in where they were found from the runs.
        arms: those with a finished run, in the study's order.
        seeds: those that all arms have.
        budgets: arm -> what it costs. overheads: arm -> component -> parameters more than the reference arm's.
        made: what all runs share: `code`, `data`, versions; and `commits`, which may be several.
        problems: what is absent, one line each.
    """

    study: Study
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    differences: tuple[KeyDifference, ...]
    budgets: Mapping[str, Budget]
    overheads: Mapping[str, Mapping[str, int]]
    made: Mapping[str, str]
    problems: tuple[str, ...]

    @property
    def controls(self) -> dict[str, str]:
        return {arm.name: arm.control for arm in self.arms if arm.control is not None}


def audit_runs(
    folder: Path,
    study: Study,
    factors: Sequence[str] | None = None,
    evaluated: Callable[[Path], Path | None] | None = None,
) -> Audit:
    """
    Args:
        folder: every finished run below it that is of an arm of the study enters.
        factors: instead of the study's. evaluated: run folder -> the folder of its evaluation, whose scores count then.

    Raises:
        AuditError, RunError: runs that cannot be compared, or no run at all.
        ConfigError: an unknown factor.
    """
    runs, problems = readable_runs(folder, study)
    if factors is not None:
        study = check_factors(study, factors)
    sorted_out, more = by_arm(runs, study)
    arms = one_per_cell(sorted_out)
    entering = [run for found in arms.values() for run in found]
    check_provenance(entering)
    if evaluated is not None:
        attach_results(entering, evaluated)
        check_results(entering)
    study = completed(study, arms)
    configs = {name: plain(found[0].config) for name, found in arms.items()}
    table = differences(arms, study)
    controls = find_controls(configs, {a: c for a, c in study.controls.items() if a in arms and c in arms})
    made = tuple(
        Arm(name, tuple(found), controls.get(name), not without_generation(configs[name]))
        for name, found in arms.items()
    )
    budgets = {name: budget(parse(Config, found[0].config), found) for name, found in arms.items()}
    base = budgets[str(study.reference)]
    return Audit(
        study=study,
        arms=made,
        seeds=tuple(sorted(set.intersection(*({run.seed for run in arm.runs} for arm in made)))),
        differences=tuple(table),
        budgets=budgets,
        overheads={name: overhead(found, base) for name, found in budgets.items() if name != study.reference},
        made=shared_facts(entering),
        problems=(*problems, *more, *absent(folder, study, arms), *notes(made, study.step)),
    )


# --------------------------------------------------------------------------- in what arms differ


def differences(arms: Mapping[str, Sequence[Run]], study: Study) -> list[KeyDifference]:
    """Every config key that is not the same in all runs, by groups; without what follows from one of them.

    Raises:
        AuditError: no factor covers it.
    """
    written = as_written({run.folder: plain(run.config) for runs in arms.values() for run in runs})
    keys = {path: config_keys(config) for path, config in written.items()}
    table, undeclared = [], []
    for key in dict.fromkeys(key for found in keys.values() for key in found):
        texts = {path: text(found.get(key, MISSING)) for path, found in keys.items()}
        if len(set(texts.values())) < 2:
            continue
        factor = factor_of(key, study.factors, [(run, texts[run.folder]) for runs in arms.values() for run in runs])
        values = {name: " | ".join(dict.fromkeys(texts[run.folder] for run in runs)) for name, runs in arms.items()}
        table.append(KeyDifference(key, group_of(key), values, factor or ""))
        undeclared += [] if factor else [key]
    if undeclared:
        raise AuditError(undeclared_line(undeclared, keys, arms, study))
    return sorted(table, key=lambda row: [*GROUPS, "other"].index(row.group))


def factor_of(key: str, factors: Sequence[str], values: Sequence[tuple[Run, str]]) -> str | None:
    """The declared factor that covers a key; `ablation` does where the runs of no ablation that sets it all agree."""
    named = next((factor for factor in factors if factor != "ablation" and covers(factor, key)), None)
    if named is not None or "ablation" not in factors:
        return named
    setters = [set_by_ablations(key, run.config.get("ablation") or ()) for run, _ in values]
    others = {value for (_, value), setter in zip(values, setters, strict=True) if setter is None}
    return next((setter for setter in setters if setter), None) if len(others) < 2 else None


def undeclared_line(
    undeclared: Sequence[str], keys: Mapping[Path, Mapping[str, Any]], arms: Mapping[str, Sequence[Run]], study: Study
) -> str:
    """Names the run that is farthest from the others in these keys."""
    votes = {key: Counter(text(found.get(key, MISSING)) for found in keys.values()) for key in undeclared}
    usual = {key: counted.most_common(1)[0][0] for key, counted in votes.items()}
    mine = {path: {k: text(found.get(k, MISSING)) for k in undeclared} for path, found in keys.items()}
    odd = max(keys, key=lambda path: sum(mine[path][key] != usual[key] for key in undeclared))
    apart_keys = [key for key in undeclared if mine[odd][key] != usual[key]]
    what = listed(f"{key} is {mine[odd][key]}, in other runs {usual[key]}" for key in apart_keys)
    arm = next(name for name, runs in arms.items() if odd in [run.folder for run in runs])
    wanted = ",".join([*study.factors, *dict.fromkeys(key.split(".")[0] for key in undeclared)])
    where = f"factors=[{wanted}]" + (f", or study.factors of {study.name}" if study.arms else "")
    return f"{odd} (arm {arm}): {what}; no declared factor. If the arms are meant to differ in it, declare it: {where}"


def group_of(key: str) -> str:
    top = key.split(".")[0]
    return next((group for group, tops in GROUPS.items() if top in tops), "other")


def check_factors(study: Study, factors: Sequence[str]) -> Study:
    """The study with other factors. Raises ConfigError: one that is no key of the config."""
    known = {field.name for field in fields(Config)}
    wrong = next((factor for factor in factors if factor.split(".")[0] not in known), None)
    if wrong is not None:
        raise ConfigError(f"factors: {wrong!r} is no key of the config; its top-level keys: {', '.join(sorted(known))}")
    return replace(study, factors=tuple(factors))
