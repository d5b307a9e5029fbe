"""Which runs a study consists of, in which order they are begun, and what they will cost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from symbiotic.config import CONF
from symbiotic.files import read_json
from symbiotic.schema import Config, ConfigError, near_miss, parse
from symbiotic.studies.runs_of import differing, plain, text, training_keys
from symbiotic.studies.study import Study

Compose = Callable[[Sequence[str]], Config]

WHERE = (
    "hydra",
    "study",
    "dry_run",
    "threads",
    "paths",
    "trainer",
    "log_every",
    "save_every",
    "name",
    "logger",
    "metric",
    "data",
)
"""Top-level keys that may be set beside a study, as long as no run computes anything else by it."""


PARENT_MADE = re.compile(r"stage 0/\w+/False")
"""Key of the journal for a parent that was trained, not found."""


@dataclass(frozen=True)
class Cell:
    """A run of a study. overrides: what `src/train.py` gets."""

    arm: str
    seed: int
    config: Config
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def run(self) -> str:
        return self.folder.name


def cells_of(study: Study, extras: Sequence[str], compose: Compose, seeds: Sequence[int] | None = None) -> list[Cell]:
    """Every run, seed by seed, so that a study that ends early has whole seeds.

    Args:
        extras: overrides of all runs that only say where and how they run. compose: overrides -> config.
        seeds: only these of the study's.

    Raises:
        ConfigError: an override that changes what the study declares, or a seed that is none of the study's.
    """
    for override in extras:
        key = override.lstrip("+~").split("=")[0].split("/")[0].split(".")[0]
        if key not in WHERE:
            known = near_miss(key, WHERE)
            raise ConfigError(f"{override}: a study says what its runs are; beside it only where they run; {known}")
    for seed in seeds or ():
        if seed not in study.seeds:
            raise ConfigError(f"seed={seed}: must be one of study.seeds, {list(study.seeds)}")
    configs = {arm: arm_config(study, arm, extras, compose) for arm in study.arms}
    return [
        Cell(arm, seed, with_seed(config, seed), tuple(member_overrides(study, arm, seed, extras)))
        for seed in study.seeds
        if seeds is None or seed in seeds
        for arm, config in configs.items()
    ]


def member_overrides(study: Study, arm: str, seed: int, extras: Sequence[str]) -> list[str]:
    escaped = arm.replace("\\", "\\\\").replace("'", "\\'")
    return [f"study={study.name}", *study.overrides(arm), *extras, f"seed={seed}", f"++study.member='{escaped}'"]


def arm_config(study: Study, arm: str, extras: Sequence[str], compose: Compose) -> Config:
    """Of its runs, with seed 0. Raises ConfigError: an extra override changes what is computed."""
    declared = study.composed[arm]
    if all(override.lstrip("+~").startswith(("hydra", "study")) for override in extras):
        return parse(Config, declared)
    config = compose([f"study={study.name}", *study.overrides(arm), *extras])
    own, keys = training_keys(plain(config)), training_keys(declared)
    for key in differing(own, keys):
        change = f"{key} is {text(own.get(key))} and declared as {text(keys.get(key))}"
        raise ConfigError(f"{' '.join(extras)}: changes arm {arm}: {change}; {CONF.name}/study/ says what arms are")
    return config


def with_seed(config: Config, seed: int) -> Config:
    """The same run with another seed: only its folder's name shows it."""
    folder = Path(config.run_dir)
    name = folder.name.removesuffix(f"-seed{config.seed}") + f"-seed{seed}"
    return dataclasses.replace(config, seed=seed, run_dir=str(folder.with_name(name)))


# --------------------------------------------------------------------------- the order


@dataclass(frozen=True)
class Parent:
    """A parent that several runs start from, and that is not there. cell: one of them."""

    key: str
    cell: Cell


def missing_parents(cells: Sequence[Cell]) -> list[Parent]:
    """One for each parent that these runs need and the cache does not have."""
    from symbiotic.arc import stage0_config, stage0_key
    from symbiotic.config import instantiate

    found: dict[str, Parent] = {}
    prints: dict[str, str] = {}
    for cell in cells:
        if cell.config.init.checkpoint is not None:
            continue
        source = cell.config.data.source
        fingerprint = prints.setdefault(repr(source), "") or instantiate(source, "data.source").fingerprint
        prints[repr(source)] = fingerprint
        key = stage0_key(stage0_config(cell.config), fingerprint)
        if not (Path(cell.config.paths.cache) / "stage0" / key / "parent.safetensors").is_file():
            found.setdefault(key, Parent(key, cell))
    return list(found.values())


# --------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Forecast:
    """runs, parents: to be made. seconds: of all of them one after another; None where nothing was timed yet."""

    runs: int
    parents: int
    processes: int | None
    seconds: float | None

    @property
    def wall(self) -> float | None:
        return None if self.seconds is None or self.processes is None else self.seconds / max(1, self.processes)


def forecast(
    cells: Sequence[Cell], parents: int, processes: int | None, timed: Mapping[str, Sequence[tuple[str, float]]]
) -> Forecast:
    """
    Args:
        timed: `run` and `parent` -> (arm, seconds) of those that were made: a run takes the mean of its arm, else of
            all. processes: side by side; None where it is not known.
    """
    of_arm: dict[str, list[float]] = {}
    for arm, seconds in timed.get("run", ()):
        of_arm.setdefault(arm, []).append(seconds)
    every = [seconds for found in of_arm.values() for seconds in found]
    parent = [seconds for _, seconds in timed.get("parent", ())]
    if not every or (parents and not parent):
        return Forecast(len(cells), parents, processes, None)
    runs = sum(mean(of_arm.get(cell.arm, every)) for cell in cells)
    return Forecast(len(cells), parents, processes, runs + (parents * mean(parent) if parents else 0.0))


def timed_before(cells: Sequence[Cell]) -> dict[str, list[tuple[str, float]]]:
    """As `timed` of `forecast`, for a study of which nothing was made: what the steps of the arc took for other runs on
    this machine, by their journal. A run is its joint training; a parent is any that was trained."""
    from symbiotic.arc import SECONDS, joint_key

    found: dict[str, list[tuple[str, float]]] = {"run": [], "parent": []}
    for cache in {cell.config.paths.cache for cell in cells}:
        known = read_json(Path(cache) / SECONDS) or {}
        found["parent"] += [("", took) for key, took in known.items() if PARENT_MADE.fullmatch(key)]
        arms = {cell.arm: f"joint/{joint_key(cell.config)}" for cell in cells if cell.config.paths.cache == cache}
        found["run"] += [(arm, known[key]) for arm, key in arms.items() if key in known]
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
