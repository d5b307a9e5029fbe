"""What holds at a step of joint training: pure functions of the config and the step.

Because nothing here has a memory, a run that resumes inside a phase is right by construction.
"""

from __future__ import annotations

from collections.abc import Iterable

from symbiotic.schema import Phase, Phases, Rates
from symbiotic.training.roles import role_lr


def active_phases(phases: Phases) -> list[Phase]:
    """The phases that last at least one step, in order."""
    return [p for p in phases.list if p.until > 0]


def phase_at(phases: Phases, step: int) -> Phase:
    """The phase of optimiser step `step` (from 0); after the end, the last one."""
    listed = active_phases(phases)
    return next((p for p in listed if step < p.until), listed[-1])


def shield_level(phases: Phases, step: int) -> float:
    """Level of the gradient shield: the generation gradient through its targets is scaled by 1 - level."""
    return phase_at(phases, step).shield


def lr_factor(warmup: int, decay: float, total: int, step: int) -> float:
    """Linear warm-up over `warmup` steps, then constant, then linear to 0 over the last share `decay` of `total`."""
    start = total - round(decay * total)
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = 1.0 if step < start else max(0.0, (total - step) / max(1, total - start))
    return min(up, down)


def role_rates(rates: Rates, phases: Phases, step: int, roles: Iterable[str]) -> dict[str, float]:
    """Learning rate of every role at a step: base rate x schedule x the phase's factor."""
    factor = lr_factor(rates.warmup, rates.decay, phases.steps, step)
    phase = phase_at(phases, step)
    return {r: role_lr(r, rates.lr, rates.by_role) * factor * phase.rate.get(r, 1.0) for r in roles}
