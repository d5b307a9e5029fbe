"""Rules for the list of phases: where they end, and what may change where.

Standard library only.
"""

from __future__ import annotations

from symbiotic.checks.rules import at_least, check_weights, known, require, share
from symbiotic.schema import Condition, Config, ConfigError, Phase, Phases, near_miss

LOGGED = ("train/", "grad_norm/", "routing/", "eval/", "conflict/", "leak/", "alarm/", "shared_only/", "task/")
"""First parts of the names of metrics that a phase may end by; all of them are the same on every rank and machine,
which speeds are not."""


def check_phases(config: Config) -> None:
    """Raises ConfigError."""
    phases = config.phases
    _numbers(phases)
    if not phases.list:
        raise ConfigError("phases.list=[]: must hold at least one phase with until > 0")
    first = 0
    for i, phase in enumerate(phases.list):
        key = f"phases.list[{i}]"
        right = f"must be above {first}, where the phase before ends" if first else "must be positive"
        require(phase.until > first, f"{key}.until", phase.until, right)
        _phase(key, phase, config)
        if phase.when is not None:
            _condition(f"{key}.when", phase.when)
        if phase.mix is not None:
            check_weights(f"{key}.mix", phase.mix, config.mix.drop, config.data.sets)
        first = phase.until
    right = f"the last phase must end at phases.steps={phases.steps}"
    require(first == phases.steps, f"phases.list[{len(phases.list) - 1}].until", first, right)
    _fixed_steps(config)


def _numbers(phases: Phases) -> None:
    at_least(phases, "phases.", 1, "steps")
    at_least(phases, "phases.", 0, "shield_steps stage1_steps")
    for name in ("shield_steps", "stage1_steps"):
        steps, right = getattr(phases, name), f"must be at most phases.steps={phases.steps}"
        require(steps <= phases.steps, f"phases.{name}", steps, right)
    share(phases, "phases.", "release_scale")


def _phase(key: str, phase: Phase, config: Config) -> None:
    share(phase, f"{key}.", "shield")
    require(phase.balance is None or phase.balance >= 0, f"{key}.balance", phase.balance, "must not be negative")
    known(f"{key}.rate", phase.rate, config.rates.roles, "role")
    known(f"{key}.frozen", phase.frozen, config.rates.roles, "role")
    for role, factor in phase.rate.items():
        require(factor >= 0, f"{key}.rate.{role}", factor, "must not be negative")


def _condition(key: str, when: Condition) -> None:
    at_least(when, f"{key}.", 1, "logs")
    if when.above is None and when.below is None:
        raise ConfigError(f"{key}: must have a bound; set above or below")
    if when.above is not None and when.below is not None:
        require(when.above < when.below, f"{key}.above", when.above, f"must be less than below={when.below:g}")
    if not when.metric.startswith(LOGGED):
        near = near_miss(when.metric.split("/")[0] + "/", LOGGED)
        raise ConfigError(f"{key}.metric={when.metric}: no logged metric that a phase may end by; {near}")


def _fixed_steps(config: Config) -> None:
    """What depends on the step alone must not depend on a metric: the data of a step, and where the rates fall."""
    listed, rates = config.phases.list, config.rates
    decays = [rates.decay, *(own.decay for own in rates.schedules.values() if own.decay is not None)]
    falls = config.phases.steps - round(max(decays) * config.phases.steps)
    for i, phase in enumerate(listed):
        if phase.when is None:
            continue
        if i == len(listed) - 1:
            raise ConfigError(f"phases.list[{i}].when: the last phase ends at phases.steps; nothing comes after it")
        if listed[i + 1].mix is not None:
            right = f"the phase {phase.name} before it ends by a metric; a mix can only begin at a fixed step"
            raise ConfigError(f"phases.list[{i + 1}].mix: {right}")
        right = f"a phase that may end by a metric must end before the rates fall, at step {falls} (rates.decay)"
        require(phase.until <= falls, f"phases.list[{i}].until", phase.until, right)
