"""A study: its arms, the config keys in which they may differ, and its hypotheses; `conf/study/NAME.yaml`, checked.

The file has one key, `study`, with the fields of `Study`. A hypothesis is worth most when it was written before its
runs.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml

from symbiotic.config import CONF, compose, explicit_keys
from symbiotic.evaluation.names import METRICS
from symbiotic.schema import ConfigError, near_miss, parse
from symbiotic.studies.attribution import named
from symbiotic.studies.runs_of import differing, plain, training_keys
from symbiotic.studies.speed import parsed

STAGE0, ITERATION0, CONTROL = "stage 0", "iteration 0", "control"
ANCHORS = (STAGE0, ITERATION0, CONTROL)
"""What an arm may be held against beside other arms: the parent of the same seed, the same run behind its split, and
the arm that differs in nothing but that its mix leaves generation out."""

ROUTING = re.compile(r"routing/[\w@.]+/(text|prompt|vit|vae|und|all)|leak/(all|layer\d+)|conflict/\w+/\w+")


@dataclass(frozen=True)
class Hypothesis:
    """`metric` of `arm` is higher (lower) than that of `against` by more than `margin`; equal: closer than `margin`.

    against: an arm, or `stage 0`, `iteration 0`, `control` of the arm. step: null: that of the study.
    effect: in place of both, one of the design: `FACTOR: LEVEL` against its first level, or two joined by ` × `.
    """

    claim: str
    metric: str
    expect: Literal["higher", "lower", "equal"]
    arm: str = ""
    against: str = ""
    effect: str = ""
    margin: float = 0.0
    step: int | None = None


@dataclass(frozen=True)
class Study:
    """
    Args:
        name: the folder of its runs, below the folder of all runs. experiment: what every arm starts from.
        step: that the numbers are of; null: the last one.
        reference: the arm that the others are compared with.
        factors: config keys in which arms may differ; a key covers all below it, `ablation` what an ablation sets.
        common: overrides of every arm.
        arms: name -> overrides on top of these. Empty, and without a design: the arms are those that the runs have.
        design: factor -> level -> overrides; every combination is an arm too, named by its levels. The first level of
            a factor is the one that the others are held against.
        leave_out: combinations that are no arms, as factor -> level; factors that are not named have any level.
        controls: arm -> its understanding-only control, where it is not the arm that differs in the mix only.
        targets: score -> the value whose first step tells how fast an arm is.
        logged: names of metrics.csv that results.csv keeps beside the scores; `*` for any text.
        budget_hours: no run of the study is begun once its runs took so many hours, those side by side added up.
        retries: how often a run that failed is begun again.
        member: in the config of a run of the study: the arm it is of.
    """

    name: str = "none"
    question: str = ""
    experiment: str = "symbiotic"
    seeds: tuple[int, ...] = ()
    step: int | None = None
    reference: str | None = None
    factors: tuple[str, ...] = ("system", "mix", "ablation")
    common: tuple[str, ...] = ()
    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    design: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    leave_out: tuple[dict[str, str], ...] = ()
    controls: dict[str, str] = field(default_factory=dict)
    hypotheses: tuple[Hypothesis, ...] = ()
    targets: dict[str, float] = field(default_factory=dict)
    logged: tuple[str, ...] = ()
    budget_hours: float | None = None
    retries: int = 1
    member: str | None = None

    @functools.cached_property
    def levels(self) -> dict[str, dict[str, str]]:
        """Arm -> factor -> level, for the arms of the design."""
        chosen = (dict(zip(self.design, one, strict=True)) for one in itertools.product(*self.design.values()))
        kept = [one for one in chosen if not any(left.items() <= one.items() for left in self.leave_out)]
        return {", ".join(one.values()): one for one in kept if one}

    def overrides(self, arm: str) -> list[str]:
        """Those of an arm, on top of which only the seed is set."""
        own = self.arms[arm]
        return merged([f"experiment={self.experiment}", f"name={self.name}", *self.common, *own])

    @functools.cached_property
    def composed(self) -> dict[str, dict[str, Any]]:
        """Arm -> the plain config of its runs, seed aside. Raises ConfigError, naming the arm."""
        return {name: _composed(f"study.arms.{name}", tuple(self.overrides(name))) for name in self.arms}


def read_study(name: str) -> Study:
    """`conf/study/NAME.yaml`; `none`: a study whose arms are found from the runs.

    Raises:
        ConfigError: no such study, or anything that is wrong with it.
    """
    path = CONF / "study" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"study={name}: no such option; {near_miss(name, (p.stem for p in path.parent.glob('*')))}")
    try:
        return study_of(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def study_of(node: Mapping[str, Any]) -> Study:
    """From the content of its file. Raises ConfigError."""
    study = with_design(parse(Study, node.get("study") or {}, "study"))
    for name in ("budget_hours", "retries"):
        value = getattr(study, name)
        if value is not None and not value >= 0:
            raise ConfigError(f"study.{name}={value:g}: must not be below 0")
    if study.arms:
        _check_words(study)
        _check_arms(study)
    elif study.hypotheses or study.controls or study.common:
        raise ConfigError("study.arms: missing; hypotheses, controls and common are about named arms")
    return study


def with_design(study: Study) -> Study:
    """With an arm for every combination of the design's levels. Raises ConfigError."""
    for i, left in enumerate(study.leave_out):
        for factor, level in left.items():
            _known(f"study.leave_out[{i}]", factor, study.design)
            _known(f"study.leave_out[{i}].{factor}", level, study.design[factor])
    for factor, levels in study.design.items():
        if len(levels) < 2:
            raise ConfigError(f"study.design.{factor}: must have at least two levels")
    made = {
        arm: tuple(o for f, level in of.items() for o in study.design[f][level]) for arm, of in study.levels.items()
    }
    twin = next((arm for arm in made if arm in study.arms), None)
    if twin is not None:
        raise ConfigError(f"study.arms.{twin}: the design has an arm of that name; one of them needs another")
    return replace(study, arms=study.arms | made)


def merged(overrides: Sequence[str]) -> list[str]:
    """With one `ablation=[...]` for all ablations that the overrides name, as Hydra takes a group only once."""
    chosen = [o.removeprefix("ablation=").strip("[]") for o in overrides if o.startswith("ablation=")]
    names = [name for text in chosen for name in text.split(",") if name != "none"]
    others = [o for o in overrides if not o.startswith("ablation=")]
    return [*others, f"ablation=[{','.join(dict.fromkeys(names))}]"] if names else others


def without_generation(config: Mapping[str, Any]) -> bool:
    """Whether the mix leaves every text-to-image set out."""
    weights, drop = config["mix"]["weights"], config["mix"]["drop"]
    return not any(weight > 0 and name.startswith("t2i") and name not in drop for name, weight in weights.items())


def find_controls(configs: Mapping[str, Mapping[str, Any]], stated: Mapping[str, str]) -> dict[str, str]:
    """Arm -> its control: stated, or the arm without generation that is equal to it but for the mix."""
    found = dict(stated)
    controls = {name: training_keys(config) for name, config in configs.items() if without_generation(config)}
    for name, config in configs.items():
        if name in controls or name in found:
            continue
        own = training_keys(config)
        same = [c for c, keys in controls.items() if all(k.startswith("mix.") for k in differing(own, keys))]
        found |= {name: same[0]} if same else {}
    return found


# --------------------------------------------------------------------------- factors


def set_by_ablations(key: str, names: Iterable[str]) -> str | None:
    """`ablation=NAME` of the one that sets a key."""
    return next((by for own, by in explicit_keys(list(names), ()).items() if covers(own, key)), None)


def covers(factor: str, key: str) -> bool:
    """Whether a key is the factor, or stands below it."""
    return key == factor or key.startswith((f"{factor}.", f"{factor} "))


# --------------------------------------------------------------------------- checks


@functools.lru_cache
def _composed(key: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    seeds = [override for override in overrides if override.startswith("seed=")]
    if seeds:
        raise ConfigError(f"{key}: {seeds[0]}: seeds are the study's; set study.seeds")
    try:
        return plain(compose(overrides))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _one_of(key: str, word: str, known: Iterable[str]) -> None:
    _known(key, word, known, "the study's arms")


def _known(key: str, word: str, known: Iterable[str], what: str = "the design's") -> None:
    known = list(known)
    if word not in known:
        raise ConfigError(f"{key}={word}: must be one of {what}; {near_miss(word, known)}")


def _check_words(study: Study) -> None:
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"study.seeds={list(study.seeds)}: must be different whole numbers, at least one")
    if study.reference is None:
        raise ConfigError("study.reference: missing; one of the study's arms")
    _one_of("study.reference", study.reference, study.arms)
    for arm, control in study.controls.items():
        _one_of("study.controls", arm, study.arms)
        _one_of(f"study.controls.{arm}", control, study.arms)
    for score in study.targets:
        _known("study.targets", score, METRICS, "the scores")
    for i, hypothesis in enumerate(study.hypotheses):
        _check_hypothesis(f"study.hypotheses[{i}]", hypothesis, study)


def _check_hypothesis(key: str, hypothesis: Hypothesis, study: Study) -> None:
    if hypothesis.effect:
        _check_effect(key, hypothesis, study)
    else:
        _check_sides(key, hypothesis, study)
    _check_metric(key, hypothesis)


def _check_effect(key: str, hypothesis: Hypothesis, study: Study) -> None:
    if hypothesis.arm or hypothesis.against:
        raise ConfigError(f"{key}.effect: stands in place of arm and against; leave these out")
    if named(hypothesis.effect, {factor: list(levels) for factor, levels in study.design.items()}) is None:
        known = [f"{factor}: {level}" for factor, levels in study.design.items() for level in list(levels)[1:]]
        right = f"must be one or two, joined by ' × ', of {', '.join(known) or 'a design, which the study has not'}"
        raise ConfigError(f"{key}.effect={hypothesis.effect}: {right}")


def _check_sides(key: str, hypothesis: Hypothesis, study: Study) -> None:
    _one_of(f"{key}.arm", hypothesis.arm, study.arms)
    if hypothesis.against not in ANCHORS:
        _one_of(f"{key}.against", hypothesis.against, [*study.arms, *ANCHORS])
    if hypothesis.against == hypothesis.arm:
        raise ConfigError(f"{key}.against={hypothesis.against}: must be another arm than {key}.arm")


def _check_metric(key: str, hypothesis: Hypothesis) -> None:
    name = hypothesis.metric
    aim = parsed(name)
    score = name if aim is None else aim[0]
    if score not in METRICS and score.split("/")[0] not in METRICS and not ROUTING.fullmatch(score):
        known = near_miss(score, METRICS)
        raise ConfigError(f"{key}.metric={name}: no such score, nor routing/METRIC/KIND or leak/all; {known}")
    if hypothesis.margin < 0 or (hypothesis.expect == "equal" and hypothesis.margin == 0):
        right = "must be above 0: how far apart counts as equal" if hypothesis.expect == "equal" else "must not be < 0"
        raise ConfigError(f"{key}.margin={hypothesis.margin:g}: {right}")


def _check_arms(study: Study) -> None:
    keys = {name: training_keys(config) for name, config in study.composed.items()}
    known = {key for flat in keys.values() for key in flat}
    groups = {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 2)}
    for factor in study.factors:
        if factor not in groups and factor != "ablation":
            raise ConfigError(f"study.factors: {factor!r} is no key of the config; {near_miss(factor, groups)}")
    seen: dict[str, str] = {}
    for name, flat in keys.items():
        twin = seen.setdefault(repr(sorted(flat.items(), key=lambda item: item[0])), name)
        if twin != name:
            raise ConfigError(f"study.arms.{name}: composes to the same run as {twin}; must differ in some key")
    controls = find_controls(study.composed, study.controls)
    for i, hypothesis in enumerate(study.hypotheses):
        if hypothesis.against == CONTROL and hypothesis.arm not in controls:
            why = "no arm is equal to it but for a mix without generation; add one, or name it in study.controls"
            raise ConfigError(f"study.hypotheses[{i}].against=control: {hypothesis.arm} has none: {why}")
