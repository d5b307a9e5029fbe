"""`python src/train.py study=NAME`: the runs of a study by Hydra's launcher, then its report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from symbiotic.claim import claimed
from symbiotic.config import Composer
from symbiotic.schema import ConfigError, RunError
from symbiotic.studies.audit import differences
from symbiotic.studies.plan import Cell, cells_of
from symbiotic.studies.runs_of import AuditError, Run
from symbiotic.studies.study import Study, study_of

DONE, INCOMPLETE = 0, 1


def plan(composer: Composer, master: DictConfig, overrides: Sequence[str]) -> tuple[Study, list[Cell]]:
    """The study and its runs, validated.

    Raises:
        ConfigError: anything that is wrong with it.
    """
    content = OmegaConf.to_container(master.study, resolve=True)
    study = study_of({"study": content})
    if not study.arms:
        raise ConfigError("study.arms: missing; a study that runs declares its arms")
    chosen = master.hydra.runtime.choices["study"]
    if study.name != chosen:
        raise ConfigError(f"study.name={study.name}: must be {chosen}, the name of its file")
    check_factors(study)
    extras = [
        o for o in overrides if not o.startswith(("study=", "seed=", "hydra.mode=")) and "hydra.searchpath" not in o
    ]
    seeds = [seed for o in overrides if o.startswith("seed=") for seed in chosen_seeds(o)]
    return study, cells_of(study, extras, composer.config, seeds or None)


def check_factors(study: Study) -> None:
    """The audit's first question, before anything is spent. Raises ConfigError: arms differ in an undeclared key."""
    arms = {arm: [Run(Path(arm), {}, config, {})] for arm, config in study.composed.items()}
    try:
        differences(arms, study)
    except AuditError as error:
        raise ConfigError(str(error)) from None


def chosen_seeds(override: str) -> list[int]:
    """Of `seed=0,1`. Raises ConfigError."""
    try:
        return [int(word) for word in override.removeprefix("seed=").split(",")]
    except ValueError:
        raise ConfigError(f"{override}: must be whole numbers, as in seed=0,1") from None


def run(composer: Composer, master: DictConfig, study: Study, cells: Sequence[Cell], job: TaskFunction) -> int:
    """The exit status: 0 where every run of the study is there."""
    from symbiotic.studies import console
    from symbiotic.studies.runner import StudyRun
    from symbiotic.studies.watch import Watch

    folder = cells[0].folder.parent
    processes = processes_of(master)
    launcher = launcher_of(composer, master, folder, job)
    made = StudyRun(study, cells, folder, launcher, processes)
    watch = Watch(cells, folder, cells[0].config.metric or "", processes)
    try:
        with claimed(folder, "run the study"):
            made.prepare()
            print(announced(made, len(cells)), flush=True)
            if cells[0].config.dry_run:
                console.show(watch.table())
                return DONE
            with watch.shown():
                complete = made.run()
            console.show(watch.table())
            print("\n".join(made.ending()), flush=True)
            summarise(study, folder)
            return DONE if complete else INCOMPLETE
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return INCOMPLETE


def announced(made: Any, total: int) -> str:
    """What is there, what is to be made, and what that will take: before anything is begun."""
    from symbiotic.callbacks.progress import duration

    found = made.forecast()
    there = total - len(made.left())
    cost = "no run was timed yet, so no estimate"
    if found.seconds is not None:
        side = "" if found.wall is None else f", {duration(found.wall)} with {found.processes} side by side"
        cost = f"about {found.seconds / 3600:.2f} hours one after another{side}"
    budget = made.study.budget_hours
    limit = f"; budget {budget:g} hours" if budget is not None else ""
    make = f"to make: {found.runs} runs, {found.parents} parents: {cost}{limit}"
    return f"study {made.study.name}: {there} of {total} runs are there; {make}"


def summarise(study: Study, folder: Path) -> None:
    """The report of what there is, from the scores of the training; no line is lost where it cannot be written."""
    from symbiotic.studies.report import report_of

    try:
        print("\n".join(map(str, report_of(study, folder, folder / "report", trained=True))), flush=True)
    except RunError as error:
        print(f"no report: {error}", flush=True)


# --------------------------------------------------------------------------- launching


def processes_of(master: DictConfig) -> int | None:
    """Side by side, as the launcher says; None for a cluster's."""
    launcher = master.hydra.launcher
    if str(launcher._target_).endswith("JoblibLauncher"):
        from joblib import effective_n_jobs

        return int(effective_n_jobs(launcher.n_jobs))
    return 1 if str(launcher._target_).endswith("BasicLauncher") else None


def launcher_of(composer: Composer, master: DictConfig, folder: Path, job: TaskFunction) -> Any:
    """Overrides of jobs -> they have ended. Hydra's own lines, which list all overrides, are not shown."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins

    hydra = composer.hydra
    assert hydra is not None
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(master))
    with open_dict(master):
        master.hydra.sweep.dir = str(folder)
        master.hydra.hydra_logging = {"root": None}
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=master)
    number = 0

    def launch(jobs: Sequence[Sequence[str]]) -> None:
        nonlocal number
        logging.getLogger("hydra").setLevel(logging.WARNING)  # the first job sets a handler up
        launcher.launch(jobs, initial_job_idx=number)
        number += len(jobs)

    return launch
