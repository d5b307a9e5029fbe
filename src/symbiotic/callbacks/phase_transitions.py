"""Does the current phase end early, because its condition holds?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from symbiotic.callbacks.events import record_event
from symbiotic.callbacks.log import logged_at
from symbiotic.callbacks.step import StepCallback, config_of
from symbiotic.schema import ConfigError, near_miss
from symbiotic.training.phases import active_phases, bounds, holds, phase_index

EVERY_LOG = ("train/", "routing/", "task/")
"""First parts of the names of metrics that are logged at every log: one that is missing then is misspelt."""


def is_misspelt(metric: str, logged: Mapping[str, float]) -> bool:
    """Whether metrics of its family were logged at this step, and it was not."""
    family = next((part for part in EVERY_LOG if metric.startswith(part)), None)
    return family is not None and metric not in logged and any(name.startswith(family) for name in logged)


class PhaseTransitions(StepCallback):
    """Looks, whenever its metric was logged, whether the condition of the current phase holds `logs` times in a row.

    Rank 0 decides for all. The transitions live in `pl_module.transitions` and in every checkpoint, so does the count
    of logs. List it behind the callbacks that log.

    Raises:
        ConfigError: the metric of a phase is not logged: at the first log where that is certain, else at its end.
    """

    def __init__(self) -> None:
        self.seen = 0  # logs in a row at which the condition held
        self.found = False  # the metric was logged in this phase

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        module, config = cast(Any, pl_module), config_of(pl_module)
        index = phase_index(config.phases, step - 1, module.transitions)
        phase = active_phases(config.phases)[index]
        if phase.when is None:
            return
        metrics = logged_at(trainer, step)
        if phase.when.metric in metrics:
            self.found = True
            self.seen = self.seen + 1 if holds(phase.when, metrics[phase.when.metric]) else 0
            if trainer.strategy.broadcast(self.seen >= phase.when.logs) and step < phase.until:
                module.transitions[index] = step
                value = metrics[phase.when.metric]
                text = f"phase {phase.name} ends: {phase.when.metric} = {value:.4g} ({bounds(phase.when)})"
                record_event(trainer, step, "phase", text, phase=phase.name, metric=phase.when.metric, value=value)
                self.seen, self.found = 0, False
        elif not self.found and is_misspelt(phase.when.metric, metrics):
            near = near_miss(phase.when.metric, metrics)
            raise ConfigError(f"phases.list[{index}].when.metric={phase.when.metric}: is not logged; {near}")
        if step == phase.until:
            if not self.found:
                logged = ", ".join(sorted(metrics)[:8]) or "nothing"
                never = f"was never logged in the phase {phase.name}; logged at step {step}: {logged}, …"
                raise ConfigError(f"phases.list[{index}].when.metric={phase.when.metric}: {never}")
            how = "held there" if self.seen >= phase.when.logs else "did not hold"
            text = f"phase {phase.name} ends at its last step; its condition {how} ({bounds(phase.when)})"
            record_event(trainer, step, "phase", text, phase=phase.name, metric=phase.when.metric)
            self.seen, self.found = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.found = int(state_dict["seen"]), bool(state_dict["found"])
