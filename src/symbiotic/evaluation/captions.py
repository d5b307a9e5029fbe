"""The caption list of the embedded generation benchmark: `captions.jsonl` and `images/{id}.png`.

A line is `{id, caption, held_out, digit, foreground, background, layout}`; a line that cannot be used is named and
left out. The image is the reference: what the caption describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.tables import halved, parse_json

ATTRIBUTES = ("digit", "foreground", "background", "layout")


@dataclass(frozen=True)
class Caption:
    """number: its place in the file, which the image's noise is drawn from."""

    number: int
    id: str
    caption: str
    held_out: bool  # this combination of attributes stands in no training caption
    attributes: tuple[Any, ...]  # values of ATTRIBUTES
    image: Path


def read_captions(folder: str | Path, limit: int, problems: list[str]) -> tuple[list[Caption], np.ndarray]:
    """The first `limit` captions, less those that cannot be used, with their reference images uint8 [n, H, W, 3].

    Seen and held-out combinations take turns in the file. problems: gets one line for everything left out; an image
    of another size than the first one is left out too.

    Raises:
        DataError: no `captions.jsonl` in the folder.
    """
    folder = Path(folder)
    path = folder / "captions.jsonl"
    with readable_errors("read", path):
        lines = path.read_bytes().splitlines()
    captions: list[Caption] = []
    images: list[np.ndarray] = []
    for number, line in enumerate(lines[:limit]):
        try:
            caption = _caption(number, line, folder)
            image = load_image(caption.image)
            if images and image.shape != images[0].shape:
                raise DataError(f"image of {image.shape[:2]} pixels; the first one has {images[0].shape[:2]}")
        except DataError as error:
            problems.append(f"{path.name}: line {number + 1}: {error}")
            continue
        captions.append(caption)
        images.append(image)
    return captions, np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)


def image_size(folder: str | Path, otherwise: tuple[int, int] = (20, 20)) -> tuple[int, int]:
    """(height, width) of the reference images; `otherwise` where there is none."""
    try:
        _, images = read_captions(folder, 1, [])
    except DataError:
        return otherwise
    return (images.shape[1], images.shape[2]) if len(images) else otherwise


def _caption(number: int, line: bytes, folder: Path) -> Caption:
    try:
        row = parse_json(line)
        values = tuple(row[name] for name in ATTRIBUTES)
        image = folder / "images" / f"{row['id']}.png"
        item = Caption(number, str(row["id"]), str(row["caption"]), bool(row["held_out"]), values, image)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from error
    except (KeyError, TypeError) as error:
        text = f"needs the key {error}" if isinstance(error, KeyError) else "must be a mapping"
        raise DataError(text) from error
    if halved(item.caption):
        raise DataError(f"caption {item.caption!r} holds half a character")
    if not image.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"id {item.id!r} leaves the folder")
    return item
