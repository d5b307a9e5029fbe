"""Which finished run is which cell (arm and seed) of a study, and why other cells are empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from symbiotic.config import read_yaml
from symbiotic.runs import VERSIONS
from symbiotic.schema import Config, RunError, parse
from symbiotic.studies import results_file
from symbiotic.studies.compare import named_arms
from symbiotic.studies.plan import with_seed
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
from symbiotic.studies.study import Study, without_generation
from symbiotic.trained import read_config

NEEDED = ("code", "commit", *VERSIONS)
"""Without these of its provenance, a run cannot be compared."""


def readable_runs(folder: Path, study: Study) -> tuple[list[Run], list[str]]:
    """Finished runs with all of their provenance and a config of this code, and a line for each without; those whose
    folders are elsewhere from the rows of the study's results.

    Raises:
        AuditError: there is none.
    """
    runs, problems = [], []
    for path in finished_folders(folder):
        try:
            run = read_run(path)
            lacking = lacks(run)
            read_config(path)
        except RunError as error:
            problems.append(f"left out: {error}")
            continue
        if lacking:
            problems.append(f"left out: {path}: it does not say its {', '.join(lacking)}; run it again")
        else:
            runs.append(run)
    rows, lines = row_runs(folder, study, {run.folder.name for run in runs})
    runs, problems = [*runs, *rows], [*problems, *lines]
    if not runs:
        why = f" ({problems[0]})" if problems else ""
        raise AuditError(f"{folder}: no finished run (a folder with summary.json) in here{why}")
    return runs, problems


def row_runs(folder: Path, study: Study, have: set[str]) -> tuple[list[Run], list[str]]:
    """The runs of `results.csv` that are not among these names, and a line for each that is no run of the study."""
    runs, problems = [], []
    for row in results_file.read_rows(folder / results_file.FILE):
        arm, seed = row["arm"], row["seed"]
        if row["run"] in have:
            continue
        config = study.composed.get(arm)
        declared = None if config is None else with_seed(parse(Config, config), int(seed)).run_dir
        if config is None or Path(str(declared)).name != row["run"]:
            problems.append(f"left out: {row['run']}, a row of {results_file.FILE}: arm {arm} is none, or another, now")
        else:
            runs.append(results_file.run_of(row, config, folder))
    return runs, problems


def lacks(run: Run) -> list[str]:
    """What a result must not lack, and this one does."""
    made = run.summary.get("provenance") or {}
    missing = [key for key in NEEDED if not made.get(key)]
    return missing + [key for key in ("data", "seed", "steps", "scores", "n") if run.summary.get(key) is None]


def by_arm(runs: Sequence[Run], study: Study) -> tuple[dict[str, list[Run]], list[str]]:
    """Arm -> its runs, and a line for every run of no arm and every other seed.

    Raises:
        AuditError: no run is of any arm, or a run of no arm stands where a run of its nearest arm is missing.
    """
    if not study.arms:
        return named_arms(runs), []
    wanted = {name: training_keys(config) for name, config in study.composed.items()}
    found: dict[str, list[Run]] = {name: [] for name in wanted}
    strangers, other_seeds = [], Counter[int]()
    for run in runs:
        name, apart = nearest_arm(run, wanted)
        if apart:
            strangers.append((run, name, f"{run.folder}: of no arm; nearest is {name}, but {apart}"))
        elif run.seed not in study.seeds:
            other_seeds[run.seed] += 1
        else:
            found[name].append(run)
    for run, name, line in strangers:
        if run.seed in study.seeds and run.seed not in [one.seed for one in found[name]]:
            help_ = "run the arm as declared, declare this one as an arm, or move it away"
            raise AuditError(f"{line}; and there is no run of {name} with seed {run.seed}: {help_}")
    lines = [f"left out: {line}" for _, _, line in strangers]
    lines += [
        f"left out: {count} run{'s' * (count > 1)} of seed {seed}, which is none of the study's"
        for seed, count in sorted(other_seeds.items())
    ]
    if not any(found.values()):
        raise AuditError(f"no run is of an arm of the study {study.name}: {lines[0].removeprefix('left out: ')}")
    return {name: made for name, made in found.items() if made}, lines


def nearest_arm(run: Run, wanted: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """The arm from which the run differs in the fewest keys, and these in words: none for a run of that arm."""
    keys = training_keys(plain(run.config))
    apart = {name: differing(keys, expected) for name, expected in wanted.items()}
    name = min(apart, key=lambda one: len(apart[one]))
    given = ((key, keys.get(key, MISSING), wanted[name].get(key, MISSING)) for key in apart[name])
    return name, listed(f"{key} is {text(own)}, not {text(declared)}" for key, own, declared in given)


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

    The reference is then the first arm of the standard system that generates and that no alarm changed, else the first.

    Raises:
        AuditError: the study's reference arm has no finished run.
    """
    if study.reference is not None and study.reference not in arms:
        raise AuditError(f"study.reference={study.reference}: no finished run of it; the other arms need it")
    plain_ones = [n for n, runs in arms.items() if runs[0].config["system"]["name"] == "standard_moe"]
    generating = [n for n in plain_ones if not without_generation(plain(arms[n][0].config))]
    untouched = [n for n in generating if not any(run.summary.get("events", {}).get("intervention") for run in arms[n])]
    reference = study.reference or next(iter([*untouched, *generating, *plain_ones, *arms]))
    seeds = study.seeds or tuple(sorted({run.seed for runs in arms.values() for run in runs}))
    return replace(study, reference=reference, seeds=seeds)


def absent(folder: Path, study: Study, arms: Mapping[str, list[Run]]) -> list[str]:
    """A line for every run of the study that is not there, why where that is known, and one for every other run that
    was begun."""
    wanted = {name: training_keys(config) for name, config in study.composed.items()}
    wanted = wanted or {name: training_keys(plain(runs[0].config)) for name, runs in arms.items()}
    begun, others = dict[tuple[str, int], str](), []
    for path, why in unfinished(folder).items():
        try:
            config = plain(read_yaml(path / "config.yaml"))
            keys, seed = training_keys(config), int(config["seed"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            others.append(f"left out: {path}: {why}, and its config.yaml cannot be read")
            continue
        name = next((name for name, expected in wanted.items() if not differing(keys, expected)), None)
        if name is None or seed not in study.seeds:
            others.append(f"left out: {path}: {why}")
        else:
            begun[name, seed] = f"{path}: {why}"
    have = {(name, run.seed) for name, runs in arms.items() for run in runs}
    cells = [(name, seed) for name in study.arms or arms for seed in study.seeds]
    missing = [cell for cell in cells if cell not in have]
    return [*(f"missing: {name}, seed {seed}: {begun.get((name, seed), 'no run')}" for name, seed in missing), *others]


def unfinished(folder: Path) -> dict[Path, str]:
    """Folder -> what is known of it, for every run below `folder` without a summary."""
    halted = stopped(folder)
    begun = [path.parent for path in sorted(folder.rglob("config.yaml"))]
    left = [f for f in begun if not (f / "summary.json").exists() and not (f / "parent.safetensors").exists()]
    return {path: f"stopped by its alarm ({halted[path]})" if path in halted else "unfinished" for path in left}
