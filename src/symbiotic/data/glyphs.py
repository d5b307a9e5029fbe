"""Pictures of digits: a small font, real handwriting, colours, and the two renderers.

Shapes: a digit is an [8, 8] map of ink in [0, 1]; pictures are uint8 [H, W, 3].
The handwriting is scikit-learn's bundled copy of the UCI digits: 1,797 scans of 8x8 pixels with 17 grey levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from symbiotic.data.packing import Array

CELL = 8
READING_SIZE = (12, 20)  # height, width: two digits
GENERATION_SIZE = (20, 20)

FOREGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (225, 50, 50),
    "green": (60, 200, 70),
    "blue": (75, 115, 250),
    "yellow": (245, 225, 70),
    "purple": (205, 85, 230),
    "white": (240, 240, 240),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 24),
    "gray": (112, 112, 112),
    "brown": (104, 64, 32),
    "teal": (16, 96, 100),
}
LAYOUTS: dict[str, tuple[slice, slice]] = {  # where the bar lies: rows, columns
    "top": (slice(0, 2), slice(None)),
    "bottom": (slice(-2, None), slice(None)),
    "left": (slice(None), slice(0, 2)),
    "right": (slice(None), slice(-2, None)),
}

_FONT = (
    ".####. ##..## ##..## ##..## ##..## ##..## ##..## .####.",
    "..##.. .###.. ####.. ..##.. ..##.. ..##.. ..##.. ######",
    ".####. ##..## ....## ...##. ..##.. .##... ##.... ######",
    ".####. ##..## ....## ..###. ..###. ....## ##..## .####.",
    "...##. ..###. .####. ##.##. ##.##. ###### ...##. ...##.",
    "###### ##.... ##.... #####. ....## ....## ##..## .####.",
    "..###. .##... ##.... #####. ##..## ##..## ##..## .####.",
    "###### ....## ....## ...##. ...##. ..##.. ..##.. ..##..",
    ".####. ##..## ##..## .####. .####. ##..## ##..## .####.",
    ".####. ##..## ##..## ##..## .##### ....## ...##. .###..",
)


@cache
def glyph(digit: int) -> Array:
    """The font's ink map of a digit, [8, 8] float32; read-only."""
    ink = np.zeros((CELL, CELL), dtype=np.float32)
    ink[:, 1:7] = [[mark == "#" for mark in row] for row in _FONT[digit].split()]
    ink.flags.writeable = False
    return ink


@cache
def scans() -> tuple[Array, Array]:
    """The real handwriting: ink [1797, 8, 8] float32 in [0, 1] and the digits [1797]."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    return (bundled.images / 16).astype(np.float32), bundled.target.astype(np.int64)


def split_scans(seed: int, test_share: float = 0.2) -> tuple[dict[int, Array], dict[int, Array]]:
    """Digit -> scan numbers for training, and the same for testing. No scan is in both."""
    rng = np.random.default_rng([seed, 3])
    train, test = {}, {}
    labels = scans()[1]
    for digit in range(10):
        numbers = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(len(numbers) * test_share)
        test[digit], train[digit] = numbers[:cut], numbers[cut:]
    return train, test


def paint(ink: Array, foreground: str, background: str, jitter: int, rng: np.random.Generator) -> Array:
    """Ink [H, W] in [0, 1] -> float32 [H, W, 3] in both colours, each channel of them off by up to `jitter`."""
    colours = np.array([BACKGROUNDS[background], FOREGROUNDS[foreground]], dtype=np.float32)
    colours += rng.integers(-jitter, jitter + 1, size=(2, 3))
    return colours[0] + ink[:, :, None] * (colours[1] - colours[0])


def render_reading(cells: Sequence[Array], foreground: str, background: str, rng: np.random.Generator) -> Array:
    """Two ink maps [8, 8] side by side, moved by up to a pixel, with noise: uint8 [12, 20, 3].

    The noise has steps of 16, which costs a reader nothing and keeps the PNG under one tar block.
    """
    ink = np.zeros(READING_SIZE, dtype=np.float32)
    dy, dx = rng.integers(-1, 2, size=2)
    for number, cell in enumerate(cells):
        y, x = 2 + dy, 2 + dx + CELL * number
        ink[y : y + CELL, x : x + CELL] = cell
    picture = paint(ink, foreground, background, 8, rng)
    picture += 16 * np.rint(0.75 * rng.standard_normal(picture.shape, dtype=np.float32))
    return np.clip(picture, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Attributes:
    """What a caption says of a generated picture."""

    digit: int
    foreground: str
    background: str
    layout: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Attributes:
        """From a record of a shard or a line of `captions.jsonl`; other keys are ignored."""
        return cls(int(record["digit"]), record["foreground"], record["background"], record["layout"])

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def short_caption(self) -> str:
        return f"{self.foreground} {self.digit} on {self.background} bar {self.layout}"

    @property
    def long_caption(self) -> str:
        return (
            f"a picture of the digit {self.digit} painted in {self.foreground} "
            f"on a {self.background} canvas with a bar at the {self.layout} ."
        )


def all_attributes() -> list[Attributes]:
    """All 960 combinations, in a fixed order."""
    return [Attributes(*values) for values in product(range(10), FOREGROUNDS, BACKGROUNDS, LAYOUTS)]


def held_out_attributes(seed: int) -> frozenset[Attributes]:
    """96 combinations that no training picture shows: one digit for every colours and layout, digits balanced.

    So every value, and every pair of values, still occurs in training.
    """
    places = list(product(FOREGROUNDS, BACKGROUNDS, LAYOUTS))
    digits = np.random.default_rng([seed, 4]).permutation(np.arange(len(places)) % 10)
    return frozenset(Attributes(int(digit), *place) for digit, place in zip(digits, places, strict=True))


def render_generation(attributes: Attributes, rng: np.random.Generator) -> Array:
    """The picture that a caption describes: uint8 [20, 20, 3]; colours vary by up to 6 of 255 a channel.

    The digit stands in the middle, each dot of the font 2 x 2 pixels; the bar lies along one side.
    """
    ink = np.zeros(GENERATION_SIZE, dtype=np.float32)
    ink[2:18, 2:18] = np.kron(glyph(attributes.digit), np.ones((2, 2), dtype=np.float32))
    ink[LAYOUTS[attributes.layout]] = 1.0
    picture = paint(ink, attributes.foreground, attributes.background, 6, rng)
    return np.clip(picture, 0, 255).astype(np.uint8)
