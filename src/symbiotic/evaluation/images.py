"""Images as files: what users and benchmarks bring is read with limits; what is generated is written as PNG, with what
it was made from in its text chunks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from symbiotic.data.errors import DataError

MAX_PIXELS = 40_000_000
"""Images above this are refused by their header, before they are decoded (decompression bombs)."""


def load_image(source: str | Path | bytes, name: str = "") -> np.ndarray:
    """uint8 [H, W, 3] of an image of any mode; transparency is dropped, 16 bits are scaled to 8.

    Args:
        source: a file, or its bytes. name: what messages call it; default the path.

    Raises:
        DataError: unreadable, not an image, or more than MAX_PIXELS.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with _quiet(), Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
            return _eight_bit(image, name)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except Exception as error:  # damaged files make Pillow raise OSError, ValueError, SyntaxError, struct.error, ...
        raise DataError(f"{name}: not a readable image ({type(error).__name__}: {error})") from error


def _eight_bit(image: Image.Image, name: str) -> np.ndarray:
    """Pillow cuts deeper channels off at 255; here 16 bits are scaled."""
    if image.mode == "F":
        raise DataError(f"{name}: an image of floating-point numbers; must have 8 or 16 bits a channel")
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("RGB"))
    gray = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1)


def _quiet() -> warnings.catch_warnings[None]:
    """Pillow's own warning about large images says less than our refusal."""
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def save_image(path: Path, pixels: np.ndarray, facts: Mapping[str, str]) -> Path:
    """Write uint8 [H, W, 3] as PNG with text chunks, always the same bytes; the file appears whole or not at all."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        Image.fromarray(pixels).save(part, "png", pnginfo=info, compress_level=6)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def image_facts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        DataError: not a readable PNG.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable PNG ({error})") from error
