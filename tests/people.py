"""Small data sets in the layouts that people have, for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hostile import Entry, tar_of
from symbiotic.data.tokenizer import Tokenizer

WORDS = ("a", "photo", "of", "red", "blue", "number", "what", "is", "this", "the", "color", "and", "then", "it")
TOKENIZER = Tokenizer.build(WORDS)


def picture(number: int, height: int = 24, width: int = 16, mode: str = "RGB", kind: str = "jpeg") -> bytes:
    """An image of one colour, which says its number roughly."""
    pixels = np.full((height, width, 3), [number * 37 % 256, number * 91 % 256, 120], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def captioned(number: int, shard: int = 0, **changes: Any) -> list[Entry]:
    """A sample as img2dataset writes it."""
    key, caption = f"{shard:05d}{number:04d}", f"a photo of number {number}"
    about = {"caption": caption, "url": f"https://example.org/{number}.jpg", "key": key, "status": "success",
             "error_message": None, "width": 16, "height": 24, "similarity": float("nan"), **changes}  # fmt: skip
    return [
        Entry(f"{key}.jpg", picture(number, mode="L" if number % 5 == 4 else "RGB")),
        Entry(f"{key}.json", json.dumps(about, indent=4).encode()),
        Entry(f"{key}.txt", caption.encode()),
    ]


def img2dataset(folder: Path, shards: int = 2, samples: int = 30) -> Path:
    """`00000.tar`, … with what else lies beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        entries = [entry for n in range(samples) for entry in captioned(n + shard * samples, shard)]
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(entries))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def conversation(number: int, **changes: Any) -> dict[str, Any]:
    """Of LLaVA, two turns; every sixth one without an image."""
    seen = number % 6 != 5
    turns = [
        {"from": "human", "value": ("<image>\n" if seen else "") + "what is this"},
        {"from": "gpt", "value": f"a number {number}"},
        {"from": "human", "value": "what is the color"},
        {"from": "gpt", "value": "red"},
    ]
    named = {"image": f"train/{number:04d}.jpg"} if seen else {}
    return {"id": f"c{number:04d}", **named, "conversations": turns, **changes}


def llava(folder: Path, samples: int = 40) -> Path:
    """`llava.json`, and its images below `images`."""
    (folder / "images" / "train").mkdir(parents=True, exist_ok=True)
    for number in range(samples):
        (folder / "images" / "train" / f"{number:04d}.jpg").write_bytes(picture(number, 16, 40))
    (folder / "llava.json").write_text(json.dumps([conversation(n) for n in range(samples)], indent=1))
    return folder / "llava.json"


def jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def texts(path: Path, samples: int = 40) -> Path:
    return jsonl(path, ({"text": f"this is number {n} and it is red"} for n in range(samples)))


def document(number: int) -> dict[str, Any]:
    """OBELICS: text, image, text, image."""
    names = [f"train/{number:04d}.jpg", f"train/{number + 1:04d}.jpg"]
    return {"texts": ["a photo of", None, "and then", None], "images": [None, names[0], None, names[1]]}
