"""Captions that images are generated from, and the real images that they are compared with, from local files.

| file | a caption is |
|---|---|
| COCO annotations, `captions_val2014.json` | one per image, see `coco_captions` |
| `.json`, a list of texts (as HPSv2's prompts) | a text |
| `.jsonl` | a line `{"caption" or "prompt": text, "image": path}`; the image may be left out |
| `.txt` | a line; empty ones are skipped |

An item that cannot be used is named and left out; what is left is a function of this file alone, so that every
benchmark on it has the same captions at the same places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.assets import content_hash, digest
from symbiotic.evaluation.context import Context, Gallery
from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.tables import halved, parse_json

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ".json, .jsonl, .txt"
NO_NUMBER = (KeyError, TypeError, ValueError, OverflowError)
"""What `int(row[key])` raises, of infinity too."""
CAPTIONS_FROM = "COCO's annotations are published at cocodataset.org (annotations_trainval2014, val2014)"


@dataclass(frozen=True)
class Captioned:
    """id: of the item in its file. image: the real one, where the file names one; it need not exist."""

    id: str
    caption: str
    image: Path | None = None


def read_caption_list(path: str | Path, images: str | Path | None = None) -> tuple[list[Captioned], list[str]]:
    """The captions of a file, and one line for every item that is none.

    Args:
        images: folder that the images' names are relative to; default the file's own folder, and of COCO's
            `captions_val2014.json` the folder `val2014` in it.

    Raises:
        DataError: a file of no known format, not readable, or without a caption.
    """
    path = Path(path)
    folder = Path(images) if images is not None else images_beside(path)
    with readable_errors("read", path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from error
    items: list[Captioned] = []
    problems: list[str] = []
    for where, item in _items(path, text, folder):
        if isinstance(item, Captioned):
            items.append(item)
        else:
            problems.append(f"{path.name}: {where}: {item}")
    if not items:
        raise DataError(f"{path}: no caption in it{f'; {problems[0]}' if problems else ''}")
    return items, problems


def available(path: Path, limit: int) -> int:
    """How many captions of a file there are, at most `limit`; 0 where it cannot be used."""
    try:
        return min(limit, len(read_caption_list(path)[0]))
    except DataError:
        return 0


def images_beside(path: Path) -> Path:
    """`val2014` beside COCO's `captions_val2014.json`, else the file's folder."""
    return path.parent / path.stem.removeprefix("captions_") if path.stem.startswith("captions_") else path.parent


def _items(path: Path, text: str, folder: Path) -> Iterator[tuple[str, Captioned | str]]:
    """(where, the item or what is wrong with it)."""
    lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".txt":
        yield from ((where, Captioned(where.split()[1], line.strip())) for where, line in lines)
    elif path.suffix == ".jsonl":
        yield from ((where, _row(where.split()[1], line, folder)) for where, line in lines)
    elif path.suffix == ".json":
        yield from _json_items(path, text, folder)
    else:
        raise DataError(f"{path}: must be a file of captions ({FORMATS})")


def _json_items(path: Path, text: str, folder: Path) -> Iterator[tuple[str, Captioned | str]]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file: {error}") from error
    if isinstance(content, list):
        for i, caption in enumerate(content):
            yield f"item {i}", _captioned(str(i), caption)
    elif isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations")):
        yield from coco_captions(content["images"], content["annotations"], folder)
    else:
        raise DataError(
            f"{path}: must be a list of captions, or COCO annotations with the lists images and annotations"
        )


def coco_captions(
    images: Sequence[Any], annotations: Sequence[Any], folder: Path
) -> Iterator[tuple[str, Captioned | str]]:
    """One caption per image: that of the smallest annotation id. The images stand in the order of the SHA-256 of
    their id as decimal text, so that the first n are a random sample for every n; the first 30,000 of val2014 are
    the sample of FID-30k (ours: papers draw theirs at random and do not publish it)."""
    captions: dict[int, tuple[int, str]] = {}
    for i, row in enumerate(annotations):
        try:
            number, owner, caption = int(row["id"]), int(row["image_id"]), row["caption"]
        except NO_NUMBER:
            yield f"annotation {i}", "needs the numbers id and image_id, and caption"
            continue
        fault = _fault(caption)
        if fault:
            yield f"annotation {number}", fault
        elif owner not in captions or number < captions[owner][0]:
            captions[owner] = number, caption
    files: dict[int, Any] = {}
    for i, row in enumerate(images):
        try:
            files[int(row["id"])] = row["file_name"]
        except NO_NUMBER:
            yield f"image {i}", "needs the number id, and file_name"
    for image in sorted(files, key=lambda number: hashlib.sha256(str(number).encode()).hexdigest()):
        if image in captions:
            yield f"image {image}", _captioned(str(image), captions[image][1], files[image], folder)
        else:
            yield f"image {image}", "no caption"


def _row(number: str, line: str, folder: Path) -> Captioned | str:
    try:
        row = parse_json(line)
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return "must be a mapping with the key caption or prompt"
    caption = row.get("caption", row.get("prompt"))
    return _captioned(str(row.get("id", number)), caption, row.get("image"), folder)


def _captioned(number: str, caption: Any, image: Any = None, folder: Path = Path()) -> Captioned | str:
    fault = _fault(caption) or (f"id {number!r} holds half a character" if halved(number) else "")
    if fault:
        return fault
    if image is None:
        return Captioned(number, caption.strip())
    if not isinstance(image, str) or Path(image).is_absolute() or ".." in Path(image).parts:
        return f"image {image!r} must be a path in the folder of images"
    return Captioned(number, caption.strip(), folder / image)


def _fault(caption: Any) -> str:
    if not isinstance(caption, str) or not caption.strip():
        return f"caption {caption!r}; must be a text, not empty"
    return f"caption {caption!r} holds half a character" if halved(caption) else ""


# --------------------------------------------------------------------------- generated and real images


def drawn(
    model: nn.Module, context: Context, path: Path, items: Sequence[Captioned], limit: int
) -> tuple[Gallery, list[Captioned]]:
    """An image of each of the first `limit` captions of a file that is not too long, shared by all benchmarks on this
    file; and these captions."""

    def check(item: Captioned) -> None:
        context.check_caption(f"{path.name}: item {item.id}", item.caption)

    usable, _ = context.kept(context.chosen(items, limit), check)
    name = f"{path.stem}-{content_hash(path)[:8]}"
    return context.gallery(model, name, [item.caption for item in usable]), usable


def image_files(folder: Path) -> list[Path]:
    """All images in a folder and below it, by name.

    Raises:
        DataError: there is none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no image in it ({' '.join(IMAGE_TYPES)})")
    return found


def files_hash(files: Sequence[Path]) -> str:
    """Changes with the names, the order and the content of files; some may not exist."""
    return digest([f"{p.name}\0{content_hash(p) if p.is_file() else ''}" for p in files])


def load_real(path: Path, size: int | None) -> np.ndarray:
    """uint8 [H, W, 3]. size: the central square is scaled (Lanczos) to so many pixels a side; null: as it is.

    Raises:
        DataError: unreadable.
    """
    pixels = load_image(path)
    if size is None:
        return pixels
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def readable_images(files: Sequence[Path], size: int | None) -> tuple[list[Path], list[str]]:
    """The files that can be read, and one line for each other one.

    Raises:
        DataError: images of several sizes, and no `size` to bring them to.
    """

    def shape(path: Path) -> tuple[int, ...] | str:
        try:
            return load_real(path, size).shape
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        shapes = dict(zip(files, threads.map(shape, files), strict=True))
    usable = [path for path, found in shapes.items() if not isinstance(found, str)]
    odd = next((path for path in usable if shapes[path] != shapes[usable[0]]), None)
    if odd is not None:
        sizes = " and ".join(f"{shapes[p][1]}x{shapes[p][0]} ({p.name})" for p in (usable[0], odd))
        raise DataError(f"reference images of {sizes} pixels; reference_size=256 makes them squares of one size")
    return usable, [found for found in shapes.values() if isinstance(found, str)]
