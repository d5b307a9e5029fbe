"""How much of the generation gradient is kept out of the shield's targets, at this step."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from symbiotic.callbacks.step import phase_of


class GradientShielding(Callback):
    """Sets `pl_module.shield`, the [] tensor that the forward reads, to the level of the current phase.

    In place, so that a compiled step is not compiled again. A function of the step and the transitions of phases: a
    resumed run has nothing to restore.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        cast(Tensor, pl_module.shield).fill_(phase_of(pl_module, trainer.global_step).shield)
