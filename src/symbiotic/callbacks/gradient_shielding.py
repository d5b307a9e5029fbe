"""How much of the generation gradient is kept out of the shield's targets, at this step."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from symbiotic.callbacks.step import config_of
from symbiotic.training.phases import shield_level


class GradientShielding(Callback):
    """Sets `pl_module.shield`, the [] tensor that the forward reads, to the level of the current phase.

    Reads the config's phases. In place, so that a compiled step is not compiled again; a function of the step only,
    so that a resumed run has nothing to restore.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        level = shield_level(config_of(pl_module).phases, trainer.global_step)
        cast(Tensor, pl_module.shield).fill_(level)
