"""What all callbacks share: optimiser steps instead of micro-batches, and the module's config."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from symbiotic.models.batch import Batch
from symbiotic.schema import Config, Phase


class StepCallback(Callback):
    """`on_micro_batch` after every micro-batch, `on_step` after every finished optimiser step.

    A step is recognised by the change of `trainer.global_step`: a condition like `global_step % n == 0` alone also
    holds in the middle of the accumulation that follows, and right after a resume.
    """

    _before = 0

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """`outputs`: what the training step returned."""

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """`step`: the number of finished optimiser steps, from 1."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.on_micro_batch(trainer, pl_module, outputs, batch)
        if trainer.global_step > self._before:
            self.on_step(trainer, pl_module, trainer.global_step)


class Probing(StepCallback):
    """A callback that measures on `probe`, a fixed batch that is set before the fit; the same on every rank."""

    probe: Batch | None = None


def config_of(pl_module: LightningModule) -> Config:
    """The config of this fit, `pl_module.config`."""
    return cast(Any, pl_module).config


def phase_of(pl_module: LightningModule, step: int) -> Phase:
    """The phase of optimiser step `step` (from 0), early ends included."""
    return cast(Any, pl_module).phase(step)
