"""What do the generated images look like at this step?"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from symbiotic.callbacks.step import StepCallback

DrawSamples = Callable[[nn.Module, int], tuple[Any, Sequence[str]]]
"""(model, number) -> (uint8 images [n, H, W, 3], their captions); deterministic, the global random state stays."""

_MARGIN, _FONT = 10, 13


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


def draw_grid(images: np.ndarray, captions: Sequence[str], columns: int = 4, width: int = 240) -> Image.Image:
    """Images [n, H, W, 3] uint8 in rows, each above its caption; small ones enlarged without smoothing.

    width: pixels of a cell; larger images are shrunk to it. Captions are wrapped and never cut.

    Raises:
        ValueError: not as many captions as images.
    """
    if len(images) != len(captions):
        raise ValueError(f"sample grid: {len(images)} images but {len(captions)} captions")
    columns = max(1, min(columns, len(images)))
    tiles = [_enlarge(Image.fromarray(image), width - 2 * _MARGIN) for image in images]
    wrapped = [textwrap.wrap(caption, width // 7) or [""] for caption in captions]
    line = _FONT + 4
    height = max((tile.height for tile in tiles), default=0) + line * max((len(w) for w in wrapped), default=0)
    height += 2 * _MARGIN
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * width, max(1, rows * height)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(_FONT)
    for i, (tile, lines) in enumerate(zip(tiles, wrapped, strict=True)):
        left, top = (i % columns) * width, (i // columns) * height + _MARGIN
        grid.paste(tile, (left + (width - tile.width) // 2, top))
        for j, text in enumerate(lines):
            middle = (left + width / 2, top + tile.height + 4 + j * line)
            pen.text(middle, text, fill="black", font=font, anchor="ma")
    return grid


def _enlarge(image: Image.Image, width: int) -> Image.Image:
    factor = width // image.width
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def save_png(picture: Image.Image, path: Path) -> Path:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)
    return path
