"""Which finished run is which cell (arm and seed) of a study, and why other cells are empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from symbiotic.schema import RunError
from symbiotic.studies.compare import named_arms
from symbiotic.studies.runs_of import (
    MISSING,
    AuditError,
    Run,
    differing,
    finished_folders,
    listed,
    plain,
    read_run,
    stopped,
    text,
    training_keys,
)
from symbiotic.studies.sameness import VERSIONS
from symbiotic.studies.study import Study, covered, without_generation

NEEDED = ("code", "commit", *VERSIONS)


def readable_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Finished runs with all of their provenance, and a line for each that lacks some.

    Raises:
        AuditError: there is none.
    """
    runs, problems = [], []
    for path in finished_folders(folder):
        try:
            run = read_run(path)
            lacking = lacks(run)
        except RunError as error:
            problems.append(f"left out: {error}")
            continue
        if lacking:
            problems.append(f"left out: {path}: its summary.json has no {', '.join(lacking)}; run it again")
        else:
            runs.append(run)
    if not runs:
        why = f" ({problems[0]})" if problems else ""
        raise AuditError(f"{folder}: no finished run (a folder with summary.json) in here{why}")
    return runs, problems


def lacks(run: Run) -> list[str]:
    """What a result must not lack, and this one does."""
    made = run.summary.get("provenance") or {}
    missing = [key for key in NEEDED if not made.get(key)]
    missing += [key for key in ("data", "seed", "steps", "scores", "n") if run.summary.get(key) is None]
    return missing + [key for key in ("seed", "system", "mix") if key not in run.config]


def by_arm(runs: Sequence[Run], study: Study) -> tuple[dict[str, list[Run]], list[str]]:
    """Arm -> its runs, and a line for every run of no arm or of another seed.

    Raises:
        AuditError: no run is of any arm, or one that stands in for a missing run differs in an undeclared key.
    """
    if not study.arms:
        return named_arms(runs), []
    wanted = {name: training_keys(config) for name, config in study.composed.items()}
    found: dict[str, list[Run]] = {name: [] for name in wanted}
    strangers: list[tuple[Run, str, list[str]]] = []
    other_seeds: dict[int, int] = {}
    for run in runs:
        keys = training_keys(plain(run.config))
        apart = {name: differing(keys, expected) for name, expected in wanted.items()}
        nearest = min(apart, key=lambda name: len(apart[name]))
        if apart[nearest]:
            strangers.append((run, nearest, apart[nearest]))
        elif run.seed not in study.seeds:
            other_seeds[run.seed] = other_seeds.get(run.seed, 0) + 1
        else:
            found[nearest].append(run)
    lines = []
    for run, nearest, apart_keys in strangers:
        mine, theirs = training_keys(plain(run.config)), wanted[nearest]
        what = listed(f"{k}={text(mine.get(k, MISSING))} (the arm: {text(theirs.get(k, MISSING))})" for k in apart_keys)
        line = f"{run.folder}: of no arm; nearest is {nearest}, but {what}"
        if run.seed in study.seeds and run.seed not in [one.seed for one in found[nearest]]:
            undeclared = [key for key in apart_keys if not covered(key, study.factors)]
            if undeclared:
                raise AuditError(f"{line}; run that arm as declared, or declare this one as an arm")
        lines.append(f"left out: {line}")
    lines += [
        f"left out: {count} run{'s' * (count > 1)} of seed {seed}, which is none of the study's"
        for seed, count in sorted(other_seeds.items())
    ]
    if not any(found.values()):
        raise AuditError(f"no run is of an arm of the study {study.name}: {lines[0].removeprefix('left out: ')}")
    return {name: made for name, made in found.items() if made}, lines


def one_per_cell(arms: Mapping[str, list[Run]]) -> dict[str, list[Run]]:
    """In the order of their seeds. Raises AuditError: two runs of one arm and seed."""
    for name, runs in arms.items():
        seen: dict[int, Run] = {}
        for run in runs:
            if seen.setdefault(run.seed, run) is not run:
                twins = f"{seen[run.seed].folder} and {run.folder}"
                raise AuditError(f"{twins}: both are arm {name}, seed {run.seed}; keep one in the folder")
    return {name: sorted(runs, key=lambda run: run.seed) for name, runs in arms.items()}


def completed(study: Study, arms: Mapping[str, list[Run]]) -> Study:
    """With the seeds and the reference arm of the runs, where the study does not say.

    The reference is then the first arm of the standard system that generates, else the first.

    Raises:
        AuditError: the study's reference arm has no finished run.
    """
    if study.reference is not None and study.reference not in arms:
        raise AuditError(f"study.reference={study.reference}: no finished run of it; the other arms need it")
    plain_ones = [n for n, runs in arms.items() if runs[0].config["system"]["name"] == "standard_moe"]
    generating = [n for n in plain_ones if not without_generation(plain(arms[n][0].config))]
    reference = study.reference or next(iter([*generating, *plain_ones, *arms]))
    seeds = study.seeds or tuple(sorted({run.seed for runs in arms.values() for run in runs}))
    return replace(study, reference=reference, seeds=seeds)


def absent(folder: Path, study: Study, arms: Mapping[str, list[Run]]) -> list[str]:
    """A line for every run of the study that is not there, and why where that is known."""
    halted = stopped(folder)
    begun: dict[tuple[str, int], str] = {}
    unknown = []
    wanted = {name: training_keys(config) for name, config in study.composed.items()}
    wanted = wanted or {name: training_keys(plain(runs[0].config)) for name, runs in arms.items()}
    for path in sorted(folder.rglob("config.yaml")):
        if (path.parent / "summary.json").exists() or (path.parent / "parent.safetensors").exists():
            continue
        why = f"stopped by its alarm: {halted[path.parent]}" if path.parent in halted else "unfinished"
        try:
            config = plain(yaml.safe_load(path.read_text(encoding="utf-8")))
            keys, seed = training_keys(config), int(config["seed"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            unknown.append(f"left out: {path.parent}: {why}, and its config.yaml cannot be read")
            continue
        name = next((name for name, expected in wanted.items() if not differing(keys, expected)), None)
        if name is None or seed not in study.seeds:
            unknown.append(f"left out: {path.parent}: {why}")
        else:
            begun[name, seed] = f"{path.parent} is {why}" if path.parent not in halted else f"{path.parent} {why}"
    lines = []
    for name in study.arms or arms:
        have = {run.seed for run in arms.get(name, ())}
        lines += [
            f"missing: {name}, seed {seed}: {begun.get((name, seed), 'no run')}"
            for seed in study.seeds
            if seed not in have
        ]
    return [*lines, *unknown]
