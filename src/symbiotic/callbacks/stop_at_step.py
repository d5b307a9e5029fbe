"""Has anybody asked this run to end? It does so between two steps, with a checkpoint."""

from __future__ import annotations

import signal

import torch
from lightning.pytorch import LightningModule, Trainer

from symbiotic.callbacks.step import StepCallback
from symbiotic.stop import Stopped, handle


class StopAtStep(StepCallback):
    """After SIGINT, SIGTERM or SIGUSR1 the fit ends with the step that it is at, on all ranks: they agree in the loop,
    for a collective inside a handler would wait for ranks that are elsewhere (spec: reliability.md 1.5).

    List it before the checkpoint, which is written when `trainer.should_stop` is set. A second signal to a single
    process ends it at once.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0: none yet
        self.ranks = 1

    def ask(self, number: int) -> None:
        if self.number and self.ranks == 1:
            raise Stopped(number)
        if not self.number:
            print(f"{signal.Signals(number).name}: stopping after this step", flush=True)
        self.number = number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Here, for Lightning has set a handler of its own by now, which would end the fit within an accumulation. What
        came while that was in force is ours to answer, too."""
        self.ranks = trainer.world_size
        handle(self.ask)
        if trainer.received_sigterm:
            self.number = self.number or signal.SIGTERM
            trainer._signal_connector.received_sigterm = False

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if trainer.world_size > 1:
            asked = torch.tensor(float(self.number), device=trainer.strategy.root_device)
            self.number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if self.number:
            trainer.should_stop = True
