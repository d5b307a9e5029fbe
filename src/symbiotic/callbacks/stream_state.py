"""Where are the streams that a run reads? Kept in its checkpoints, and with their account in its folder."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from symbiotic.data.account import write_account
from symbiotic.data.cursor import account_of
from symbiotic.data.stream_plan import StreamPlan

KEY = "streams"


class StreamState(Callback):
    """
    Args:
        plan: whose state it is. folder: where the account is written at every checkpoint.
    """

    def __init__(self, plan: StreamPlan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.plan.repeat_steps:  # the first steps over and over: they are read again
            return
        step = trainer.global_step
        checkpoint[KEY] = {"step": step, "state": self.plan.state_at(step)}
        if trainer.is_global_zero:
            states = checkpoint[KEY]["state"]
            bad = chain.from_iterable(({"source": name, **bad} for bad in s["examples"]) for name, s in states.items())
            write_account(self.folder, account_of(states, self.plan.max_bad), bad)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if KEY in checkpoint:
            self.plan.know(checkpoint[KEY]["step"], checkpoint[KEY]["state"])
