"""Which learning rate each role has at this step, and which roles are frozen."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from symbiotic.callbacks.step import config_of, phase_of
from symbiotic.training.phases import role_rates


class LRPhases(Callback):
    """Sets `lr` of every parameter group by its `role`, before each micro-batch; a function of the step and of the
    transitions of phases.

    Frozen roles have their gradients dropped right before the optimiser (and the clipping): with None an optimiser
    leaves a parameter alone, moments and weight decay included, which zeros would not (spec: reliability.md 1.11).
    Reads the config's rates and phases.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        config = config_of(pl_module)
        for optimizer in trainer.optimizers:
            roles = [group["role"] for group in optimizer.param_groups]
            transitions = cast(Any, pl_module).transitions
            rates = role_rates(config.rates, config.phases, trainer.global_step, roles, transitions)
            for group in optimizer.param_groups:
                group["lr"] = rates[group["role"]]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        frozen = phase_of(pl_module, trainer.global_step).frozen
        for group in optimizer.param_groups if frozen else ():
            if group["role"] in frozen:
                for parameter in group["params"]:
                    parameter.grad = None
