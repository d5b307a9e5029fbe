"""How evenly do the tokens of each kind use the experts, layer by layer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from symbiotic.callbacks.log import Window, log_metrics
from symbiotic.callbacks.step import StepCallback
from symbiotic.schema import ConfigError
from symbiotic.training.routing_metrics import miscount, summarise


class RoutingMonitor(StepCallback):
    """Sums the step's routing counts and logs `routing_metrics.summarise` of them every `every` optimiser steps.

    Training micro-batches only, over all ranks; padding is not in the counts. The capacity rate depends on the number
    of tokens, so it is of the whole window of `every` steps; so is its random baseline.
    Reads outputs["routing"] (`RoutingStats`), pl_module.model.visible_experts and pl_module.model.cfg.router.top_k.
    per_layer=False leaves the `routing/layer{i}/` entries out.
    """

    def __init__(self, every: int = 10, factors: Sequence[float] = (1.0, 1.25), per_layer: bool = True) -> None:
        if every < 1 or not factors or min(factors) <= 0:
            raise ConfigError(f"callbacks.routing_monitor: every={every} must be at least 1, factors={factors} above 0")
        self.every, self.factors, self.per_layer = every, tuple(factors), per_layer
        self.window = Window()

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        stats = outputs["routing"]
        self.window.add({"counts": stats.counts, "tokens": stats.tokens})

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self.every == 0:
            log_metrics(trainer, self.metrics(trainer, pl_module), step)
            self.window.clear()

    def metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """The metrics of the window; warns when the counts are not k for each token, layer and kind."""
        sums = self.window.total(trainer)
        shape = sums["counts"].shape
        host = torch.cat([value.reshape(-1) for value in (sums["counts"], sums["tokens"])]).cpu()
        counts, tokens = host[: shape.numel()].view(shape), host[shape.numel() :]
        model: Any = pl_module.model
        top_k = model.cfg.router.top_k
        problem = miscount(counts, tokens, top_k)
        if problem:
            rank_zero_warn(problem)
        metrics = summarise(counts, tokens, model.visible_experts.cpu(), top_k, self.factors)
        return {name: value for name, value in metrics.items() if self.per_layer or "/layer" not in name}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.save(trainer, checkpoint, "routing_monitor")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.load(trainer, checkpoint, "routing_monitor")
