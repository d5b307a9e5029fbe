"""Images above their captions, in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from symbiotic.files import commit

_MARGIN, _FONT = 10, 13


def draw_grid(
    images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], columns: int = 4, width: int = 240
) -> Image.Image:
    """Images uint8 [H, W, 3] in rows, each above its caption; small ones enlarged without smoothing.

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
    return commit(path, lambda temporary: picture.save(temporary, format="PNG"))
