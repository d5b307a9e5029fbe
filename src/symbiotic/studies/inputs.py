"""What users put in front of a trained run: sizes of images that its model takes, words that it knows."""

from __future__ import annotations

from collections.abc import Iterable

from symbiotic.data.errors import DataError
from symbiotic.data.packing import Array
from symbiotic.data.tokenizer import UNK, Tokenizer
from symbiotic.evaluation.images import load_image

PATCH = 4  # pixels a side, as in `data.packing`


def size_fault(height: int, width: int, max_grid: int) -> str | None:
    """What would be right, where the model does not take images of this size."""
    if height % PATCH or width % PATCH or not PATCH <= min(height, width) <= max(height, width) <= PATCH * max_grid:
        return f"sides must be multiples of {PATCH} and at most {PATCH * max_grid} pixels (model.max_grid={max_grid})"
    return None


def fitting(path: str, max_grid: int) -> Array:
    """The pixels of an image that the model can take: uint8 [H, W, 3].

    Raises:
        DataError: unreadable, or of a size that it cannot take.
    """
    pixels = load_image(path)
    height, width, _ = pixels.shape
    fault = size_fault(height, width, max_grid)
    if fault:
        raise DataError(f"{path}: {height} x {width} pixels; {fault}")
    return pixels


def unknown_words(text: str, tokenizer: Tokenizer) -> list[str]:
    """Words of the text that the corpus does not have."""
    encoded = tokenizer.inner.encode(text, add_special_tokens=False)
    spans = zip(encoded.ids, encoded.offsets, strict=True)
    return list(dict.fromkeys(text[start:end] for number, (start, end) in spans if number == UNK))


def unknown_line(texts: Iterable[str], tokenizer: Tokenizer, shown: int = 20) -> str | None:
    """The warning about unknown words of all texts; None where there are none."""
    words = list(dict.fromkeys(word for text in texts for word in unknown_words(text, tokenizer)))
    if not words:
        return None
    more = f" and {len(words) - shown} more" if len(words) > shown else ""
    return f"words that the corpus does not have, all <unk> to the model: {' '.join(words[:shown])}{more}"
