"""How well does the model do on the benchmarks, while it trains?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from symbiotic.callbacks.log import log_metrics
from symbiotic.callbacks.step import StepCallback
from symbiotic.files import read_objects, write_text

SCORES = "scores.jsonl"

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""model -> score by name; deterministic, gives the model back as it was, and touches no global random state."""


class InLoopEvaluation(StepCallback):
    """Runs `evaluate` every `every` steps (0: never), logs `eval/NAME`, adds the scores to `scores.jsonl`.

    `evaluate` has to be set before the fit when every > 0. The last step is left to whoever evaluates after the fit.
    Every rank evaluates (a sharded model needs all of them), rank 0 writes, to trainer.default_root_dir, the run
    folder.
    """

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self.evaluate: Evaluate | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.every > 0 and self.evaluate is None:
            raise RuntimeError("InLoopEvaluation: set `evaluate` before the fit")

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        due = self.every > 0 and step % self.every == 0 and step != trainer.max_steps
        if self.evaluate is None or not due:
            return
        scores = self.evaluate(pl_module.model)  # type: ignore[arg-type]
        log_metrics(trainer, {f"eval/{name}": float(value) for name, value in scores.items()}, step)
        if trainer.is_global_zero:
            record_scores(Path(trainer.default_root_dir) / SCORES, step, scores)


def record_scores(path: Path | str, step: int, scores: Mapping[str, float]) -> None:
    """Put one line `{"step": .., "scores": {..}}` into a JSONL file, sorted by step, one line a step.

    An evaluation that is done again after a resume replaces its line, and merges with what is there. NaN becomes
    null. The file is replaced whole, so a kill leaves the old one.
    """
    path = Path(path)
    known = read_scores(path)
    numbers = {name: float(value) for name, value in scores.items()}
    known[step] = known.get(step, {}) | {name: None if math.isnan(v) else v for name, v in numbers.items()}
    write_text(path, "".join(json.dumps({"step": s, "scores": known[s]}) + "\n" for s in sorted(known)))


def read_scores(path: Path | str) -> dict[int, dict[str, float | None]]:
    """Step -> scores; empty when there is no file. Lines that were damaged are left out."""
    return {int(record["step"]): record["scores"] for record in read_objects(Path(path), "step", "scores")}
