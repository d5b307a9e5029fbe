"""Images of any size and mode brought into the form that is trained on: RGB, sides that divide into patches.

The size that comes out is known from the header alone, so that lengths are counted without decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from symbiotic.data.bad import Refused
from symbiotic.data.image_files import MAX_PIXELS, decode_rgb, read_header
from symbiotic.data.packing import Array
from symbiotic.data.records import PATCH
from symbiotic.schema import ConfigError

MODES = ("none", "crop", "keep")
MAX_STRIP = 65_000
"""Pixels along the images of one sample, one below the other."""


class Box(NamedTuple):
    """One of a sample's images, which lie one below the other; in pixels."""

    top: int
    height: int
    width: int


class Fit(NamedTuple):
    """How images are fitted (ours).

    mode: `none`: they must divide into patches as they are. `crop`: the shorter side is scaled to `side`, the middle
        square is kept. `keep`: scaled down until no side is longer than `side`, each then rounded down to patches.
    side: pixels, a multiple of the patch.
    """

    mode: Literal["none", "crop", "keep"] = "none"
    side: int = 0

    def check(self, key: str) -> None:
        """Raises ConfigError. key: prefix of its keys in messages."""
        if self.mode not in MODES:
            raise ConfigError(f"{key}fit={self.mode}: must be one of {', '.join(MODES)}")
        if self.mode != "none" and (self.side < PATCH or self.side % PATCH):
            raise ConfigError(f"{key}side={self.side}: must be a multiple of {PATCH} pixels with fit={self.mode}")
        if self.mode == "none" and self.side:
            raise ConfigError(f"{key}side={self.side}: has no effect with fit=none; fit=crop or fit=keep")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size comes out with. Raises Refused: no whole patches."""
        if self.mode == "crop":
            return self.side, self.side
        if self.mode == "keep":
            scale = min(1.0, self.side / max(height, width))
            return _patches(height * scale), _patches(width * scale)
        if height % PATCH or width % PATCH:
            raise Refused("image_patches", f"{height} x {width} does not divide into patches of {PATCH} x {PATCH}")
        return height, width

    def pixels(self, image: Image.Image) -> Array:
        """uint8 [H, W, 3] of an RGB image, H and W as `size` says."""
        height, width = self.size(image.height, image.width)
        if (height, width) == (image.height, image.width):
            return np.asarray(image)
        box = None
        if self.mode == "crop":
            short = min(image.height, image.width)
            left, top = (image.width - short) / 2, (image.height - short) / 2
            box = (left, top, left + short, top + short)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _patches(length: float) -> int:
    return max(PATCH, int(length + 1e-6) // PATCH * PATCH)


def boxes_of(bodies: Sequence[bytes], fit: Fit, max_pixels: int = MAX_PIXELS) -> list[Box]:
    """Where the fitted images of a sample lie, from their headers. Raises Refused."""
    boxes: list[Box] = []
    top = 0
    for body in bodies:
        header = read_header(body, max_pixels)
        boxes.append(Box(top, *fit.size(*header.upright)))
        top += boxes[-1].height
    if top > MAX_STRIP:
        raise Refused("image_too_large", f"its {len(boxes)} images are {top:,} pixels high, more than {MAX_STRIP:,}")
    return boxes


def strip(bodies: Sequence[bytes], boxes: Sequence[Box], fit: Fit, max_pixels: int = MAX_PIXELS) -> Array:
    """The images, decoded, fitted and one below the other: uint8 [H, W, 3], black at the right of narrower ones.

    Raises:
        Refused: an image that is cut off, damaged, animated, or of no mode that is read.
    """
    images = [fit.pixels(decode_rgb(body, max_pixels)) for body in bodies]
    if len(images) == 1:
        return images[0]
    whole = np.zeros((sum(box.height for box in boxes), max(box.width for box in boxes), 3), np.uint8)
    for box, image in zip(boxes, images, strict=True):
        whole[box.top : box.top + box.height, : box.width] = image
    return whole
