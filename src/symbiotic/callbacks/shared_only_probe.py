"""How much does the model understand on its shared experts alone, while it trains?"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from symbiotic.callbacks.in_loop_evaluation import Evaluate, record_scores
from symbiotic.callbacks.log import log_metrics
from symbiotic.callbacks.step import StepCallback, config_of
from symbiotic.evaluation.benchmark import measuring
from symbiotic.layout import shared_scopes
from symbiotic.models.moe import shared_only
from symbiotic.schema import ConfigError, System

SHARED_ONLY = "shared_only.jsonl"

UNDERSTANDING = ("text", "vit")
"""Kinds of the tokens that the understanding benchmarks consist of."""


class SharedOnlyProbe(StepCallback):
    """Runs `evaluate` with the routed experts adding nothing: before training, every `every` steps (0: never), and at
    the last step. Logs `shared_only/NAME` and adds the scores to `shared_only.jsonl`, in the format of `scores.jsonl`.

    Symbiotic-MoE: run so, understanding falls over a training on understanding alone and rises over a joint one.
    `evaluate` has to be set before the fit; it should hold understanding benchmarks only. Every rank evaluates, rank 0
    writes, to trainer.default_root_dir, the run folder. Training notices nothing: modes, gradients, the random state
    and the counts are as before. Where there is nothing to switch off, or nothing left without it, it says so once.

    Raises:
        ConfigError: every < 0.
    """

    def __init__(self, every: int = 0) -> None:
        if every < 0:
            raise ConfigError(f"callbacks.shared_only_probe.every={every}: must be at least 0")
        self.every = every
        self.evaluate: Evaluate | None = None
        self._missing: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.evaluate is None:
            raise RuntimeError("SharedOnlyProbe: set `evaluate` before the fit")
        self._missing = missing(config_of(pl_module).system)
        if self._missing is not None and trainer.is_global_zero:
            print(f"shared experts alone are not evaluated: {self._missing}", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self.measure(trainer, pl_module, 0)

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step == trainer.max_steps or (self.every > 0 and step % self.every == 0):
            self.measure(trainer, pl_module, step)

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._missing is not None:
            return
        assert self.evaluate is not None
        model = pl_module.model
        with measuring(model), shared_only(model):  # type: ignore[arg-type]
            scores = self.evaluate(model)  # type: ignore[arg-type]
        log_metrics(trainer, {f"shared_only/{name}": float(value) for name, value in scores.items()}, step)
        if trainer.is_global_zero:
            record_scores(Path(trainer.default_root_dir) / SHARED_ONLY, step, scores)


def missing(system: System) -> str | None:
    """What a system lacks to be run on its shared experts alone; None: nothing."""
    if not system.pools:
        return f"{system.name} has no routed experts"
    if not any(kind in kinds for kinds in shared_scopes(system).values() for kind in UNDERSTANDING):
        return f"{system.name} has no shared expert that understands"
    return None
