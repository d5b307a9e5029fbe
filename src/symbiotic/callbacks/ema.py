"""How good is an average of the weights over the last steps?

Lightning's own `EMAWeightAveraging` does not serve here: it swaps the weights in for a validation loop, which we have
not, puts the averaged ones into the checkpoint's `state_dict` (so that a checkpoint of a step would not hold that
step's weights), leaves the model with the average at the end, and copies the whole module with its data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from symbiotic.callbacks.in_loop_evaluation import SCORES, Evaluate, record_scores
from symbiotic.callbacks.log import log_metrics
from symbiotic.callbacks.step import StepCallback
from symbiotic.training.sharded import local, whole

PREFIX = "ema/"
"""Before the names of scores of averaged weights."""


class EMA(StepCallback):
    """Exponential moving average of all parameters and floating-point buffers, `average`, over the optimiser steps.

    Every `every` steps (0: never) `evaluate` measures the averaged weights, in place of the model's own for that time;
    the scores are logged as `eval/ema/NAME` and added to `scores.jsonl` as `ema/NAME`. After the last step `save` gets
    the average. Both have to be set before the fit. The training is not changed, and the checkpoints hold its own
    weights; the average is this callback's state in them. All ranks average the same, or their parts of sharded
    parameters.

    Args:
        decay: weight of the old average in each step, less in the first ones (see `decay_at`).
    """

    def __init__(self, decay: float = 0.99, every: int = 0) -> None:
        self.decay, self.every = decay, every
        self.average: dict[str, Tensor] = {}
        self.evaluate: Evaluate | None = None
        self.save: Callable[[Mapping[str, Tensor]], object] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.save is None or (self.every > 0 and self.evaluate is None):
            raise RuntimeError("EMA: set `save`, and `evaluate` where every > 0, before the fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.average:
            self.average = {name: _exact(value).clone() for name, value in _floating(_model(pl_module)).items()}
        self.average = {name: value.to(pl_module.device) for name, value in self.average.items()}

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        weight = 1 - decay_at(step, self.decay)
        for name, value in _floating(_model(pl_module)).items():
            local(self.average[name]).lerp_(_exact(local(value)), weight)
        if self.every > 0 and step % self.every == 0 and step != trainer.max_steps:
            self.measure(trainer, pl_module, step)

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self.evaluate is not None
        model = _model(pl_module)
        with averaged(model, self.average):
            scores = {f"{PREFIX}{name}": float(value) for name, value in self.evaluate(model).items()}
        log_metrics(trainer, {f"eval/{name}": value for name, value in scores.items()}, step)
        if trainer.is_global_zero:
            record_scores(Path(trainer.default_root_dir) / SCORES, step, scores)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also where there was no step left to train: a kill may have come between the last one and this."""
        if trainer.global_step < trainer.max_steps:
            return
        state = whole({**_model(pl_module).state_dict(), **self.average})
        if trainer.is_global_zero:
            assert self.save is not None
            self.save(state)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = dict(state_dict["average"])


def decay_at(step: int, decay: float) -> float:
    """Of optimiser step `step` (from 1): min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


@contextmanager
def averaged(model: nn.Module, average: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model with averaged weights, in place; afterwards its own are back, bit by bit, also after an error."""
    own = _floating(model)
    kept = {name: local(value).clone() for name, value in own.items()}
    try:
        for name, value in own.items():
            local(value).copy_(local(average[name]))
        yield model
    finally:
        for name, value in own.items():
            local(value).copy_(kept[name])


def _model(pl_module: LightningModule) -> nn.Module:
    return cast(Any, pl_module).model


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, themselves and not copies."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _exact(value: Tensor) -> Tensor:
    """In at least float32: small steps are lost in half precision."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
