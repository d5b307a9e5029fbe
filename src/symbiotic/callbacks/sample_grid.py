"""What do the generated images look like at this step?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from symbiotic.callbacks.step import StepCallback
from symbiotic.evaluation.grid import draw_grid, save_png

DrawSamples = Callable[[nn.Module, int], tuple[Any, Sequence[str]]]
"""(model, number) -> (uint8 images [n, H, W, 3], their captions); deterministic, the global random state stays."""


class SampleGrid(StepCallback):
    """Writes `samples/step=NNNNNN.png` in the run folder, every `every` steps and at the last one.

    `draw` has to be set before the fit. Every rank samples (a sharded model needs all of them), rank 0 writes; a
    TensorBoard logger gets the picture too. every=0: only at the end. captions: number of images in the grid.
    Reads trainer.default_root_dir, the run folder.
    """

    def __init__(self, every: int = 0, captions: int = 8) -> None:
        self.every, self.captions = every, captions
        self.draw: DrawSamples | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.draw is None:
            raise RuntimeError("SampleGrid: set `draw`, the function that samples images, before the fit")

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        due = step == trainer.max_steps or (self.every > 0 and step % self.every == 0)
        if due:
            self.write(trainer, pl_module, step)

    def write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self.draw is not None
        images, captions = self.draw(pl_module.model, self.captions)  # type: ignore[arg-type]
        if not trainer.is_global_zero:
            return
        picture = draw_grid(np.asarray(images), captions)
        save_png(picture, Path(trainer.default_root_dir) / "samples" / f"step={step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(picture), step, dataformats="HWC")
