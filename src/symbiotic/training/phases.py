"""What holds at a step of joint training: pure functions of the config, the step, and the transitions so far.

A phase ends at its last step, or earlier when its condition held; `transitions` says where that happened: number of the
phase (from 0) -> step at which the next one began. They are the only memory, and part of every checkpoint; so a run
that resumes inside a phase is right by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from symbiotic.schema import Condition, Mix, Objective, Phase, Phases, Rates
from symbiotic.training.roles import role_lr

Transitions = Mapping[int, int]
NO_TRANSITIONS: Transitions = {}


def active_phases(phases: Phases) -> list[Phase]:
    """The phases that last at least one step, in order."""
    return [p for p in phases.list if p.until > 0]


def phase_index(phases: Phases, step: int, transitions: Transitions = NO_TRANSITIONS) -> int:
    """Number of the phase of optimiser step `step` (from 0); after the end, the last one."""
    listed = active_phases(phases)
    ends = (transitions.get(i, phase.until) for i, phase in enumerate(listed))
    return next((i for i, end in enumerate(ends) if step < end), len(listed) - 1)


def phase_at(phases: Phases, step: int, transitions: Transitions = NO_TRANSITIONS) -> Phase:
    """The phase of optimiser step `step` (from 0); after the end, the last one."""
    return active_phases(phases)[phase_index(phases, step, transitions)]


def balance_weight(objective: Objective, phase: Phase) -> float:
    """Weight of the balance loss in a phase: its own, or the objective's where it has none."""
    return objective.balance_weight if phase.balance is None else phase.balance


def holds(condition: Condition, value: float) -> bool:
    """Whether a logged value meets the condition; NaN never does."""
    above = condition.above is None or value > condition.above
    below = condition.below is None or value < condition.below
    return above and below and not math.isnan(value)


def bounds(condition: Condition) -> str:
    """`> 0.9, 2 logs in a row`."""
    texts = [f"> {condition.above:g}"] if condition.above is not None else []
    texts += [f"< {condition.below:g}"] if condition.below is not None else []
    return " and ".join(texts) + (f", {condition.logs} logs in a row" if condition.logs > 1 else "")


def mix_schedule(phases: Phases, mix: Mix) -> list[tuple[int, dict[str, float]]]:
    """First step and weights of every stretch of training with the same mix; a list for `DataPlan`."""
    schedule, first = [(0, dict(mix.weights))], 0
    for phase in active_phases(phases):
        if phase.mix is not None and phase.mix != schedule[-1][1]:
            schedule = [*(s for s in schedule if s[0] != first), (first, dict(phase.mix))]
        first = phase.until
    return schedule


def lr_factor(warmup: int, decay: float, total: int, step: int, shape: str = "linear") -> float:
    """Linear warm-up over `warmup` steps, then constant, then to 0 over the last share `decay` of `total`, on a line or
    on half a cosine."""
    start = total - round(decay * total)
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = 1.0 if step < start else max(0.0, (total - step) / max(1, total - start))
    down = left if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return min(up, down)


def role_factor(rates: Rates, total: int, step: int, role: str) -> float:
    """The schedule of a role at a step: its own where it has one."""
    own = rates.schedules.get(role)
    warmup = rates.warmup if own is None or own.warmup is None else own.warmup
    decay = rates.decay if own is None or own.decay is None else own.decay
    shape = rates.shape if own is None or own.shape is None else own.shape
    return lr_factor(warmup, decay, total, step, shape)


def role_rates(
    rates: Rates, phases: Phases, step: int, roles: Iterable[str], transitions: Transitions = NO_TRANSITIONS
) -> dict[str, float]:
    """Learning rate of every role at a step: base rate x its schedule x the phase's factor."""
    phase, total = phase_at(phases, step, transitions), phases.steps
    return {
        r: role_lr(r, rates.lr, rates.by_role) * role_factor(rates, total, step, r) * phase.rate.get(r, 1.0)
        for r in roles
    }
