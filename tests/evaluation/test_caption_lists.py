"""Caption lists of every format, items that cannot be used, and real images."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from assets import write_coco
from symbiotic.data.errors import DataError
from symbiotic.evaluation.caption_lists import (
    Captioned,
    files_hash,
    image_files,
    load_real,
    read_caption_list,
    readable_images,
)


def texts(path: Path) -> list[str]:
    return [item.caption for item in read_caption_list(path)[0]]


def test_coco_gives_the_first_caption_of_every_image_in_a_fixed_random_order(tmp_path: Path) -> None:
    path = write_coco(tmp_path, 12)
    items, problems = read_caption_list(path)
    assert problems == []
    order = sorted(range(100, 112), key=lambda number: hashlib.sha256(str(number).encode()).digest())
    assert [int(item.id) for item in items] == order != sorted(order)
    assert [item.caption for item in items] == [f"red {number} on black" for number in order]
    assert all(item.image is not None and item.image.is_file() for item in items)
    content = json.loads(path.read_text())
    for rows in content.values():
        rows.reverse()
    path.write_text(json.dumps(content))
    assert read_caption_list(path)[0] == items
    elsewhere, _ = read_caption_list(path, tmp_path / "train2014")
    assert elsewhere[0].image == tmp_path / "train2014" / str(items[0].image and items[0].image.name)


def test_coco_items_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "captions_x.json"
    names = {1: "a.png", 2: "b.png", 3: "../c.png", 4: "d.png", 6: "/e.png"}
    images: list[Any] = [{"id": number, "file_name": name} for number, name in names.items()]
    rows = [
        (10, 1, "  "),
        (11, 1, "kept\n"),
        (12, 2, None),
        (17, 2, "half \ud800"),
        (13, 3, "leaves"),
        (16, 6, "leaves"),
        (14, 9, "of no image"),
    ]
    annotations: list[Any] = [{"id": i, "image_id": image, "caption": text} for i, image, text in rows]
    path.write_text(
        json.dumps(
            {
                "images": [*images, {"id": 5}, 3, {"id": math.inf, "file_name": "f.png"}],
                "annotations": [*annotations, {"id": 15}, "x", {"id": math.inf, "image_id": 1, "caption": "endless"}],
            }
        )
    )
    items, problems = read_caption_list(path)
    assert items == [Captioned("1", "kept", tmp_path / "x" / "a.png")]
    expected = {
        "annotation 10: caption '  '; must be a text, not empty",
        "annotation 12: caption None; must be a text, not empty",
        "annotation 17: caption 'half \\ud800' holds half a character",
        "image 6: image '/e.png' must be a path in the folder of images",
        "annotation 8: needs the numbers id and image_id, and caption",
        "annotation 9: needs the numbers id and image_id, and caption",
        "annotation 7: needs the numbers id and image_id, and caption",
        "image 5: needs the number id, and file_name",
        "image 7: needs the number id, and file_name",
        "image 6: needs the number id, and file_name",
        "image 2: no caption",
        "image 4: no caption",
        "image 3: image '../c.png' must be a path in the folder of images",
    }
    assert set(problems) == {f"captions_x.json: {line}" for line in expected}
    assert len(problems) == len(expected)


def test_lists_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes('\ufeffred 7 \r\n\r\n\u2028blau\u00df, "x"\n'.encode())
    assert texts(tmp_path / "a.txt") == ["red 7", 'blau\u00df, "x"']
    (tmp_path / "b.json").write_text(json.dumps(["one", "", 3, "two"]))
    items, problems = read_caption_list(tmp_path / "b.json")
    assert [(item.id, item.caption) for item in items] == [("0", "one"), ("3", "two")]
    assert [line[:15] for line in problems] == ["b.json: item 1:", "b.json: item 2:"]
    rows = [
        '{"caption": "a", "image": "x/1.png"}',
        '{"prompt": "b", "id": "p7"}',
        '{"text": "c"}',
        "{",
        "[1]",
        "[" * 10**5,
        '{"caption": "d", "id": "\\ud800"}',
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    items, problems = read_caption_list(tmp_path / "c.jsonl")
    assert items == [Captioned("1", "a", tmp_path / "x/1.png"), Captioned("p7", "b")]
    assert [line.split(":")[1] for line in problems] == [" line 3", " line 4", " line 5", " line 6", " line 7"]
    assert problems[-1] == "c.jsonl: line 7: id '\\ud800' holds half a character"
    assert problems[-2] == "c.jsonl: line 6: not JSON: nested too deeply"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"a\.csv: must be a file of captions"),
        ("a.json", b"{", r"a\.json: not a JSON file"),
        ("a.json", b"[" * 10**5, r"a\.json: not a JSON file: nested too deeply"),
        ("a.json", b"{}", r"a\.json: must be a list of captions, or COCO annotations"),
        ("a.json", b"[1]", r"a\.json: no caption in it; a\.json: item 0"),
        ("a.txt", b"\n", r"a\.txt: no caption in it"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.txt", None, r"cannot read: .*a\.txt"),
    ],
)
def test_files_that_are_no_lists(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_caption_list(tmp_path / name)
    assert "\n" not in str(error.value)


def test_real_images_are_cropped_to_the_central_square_and_scaled(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert load_real(tmp_path / "wide.png", None).shape == (10, 30, 3)
    assert (load_real(tmp_path / "wide.png", 10) == 200).all()
    assert load_real(tmp_path / "wide.png", 16).shape == (16, 16, 3)
    Image.new("LA", (20, 40), (7, 9)).save(tmp_path / "gray.png")
    assert (load_real(tmp_path / "gray.png", 8) == 7).all()


def test_unreadable_images_are_named_and_mixed_sizes_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "deep" / "b.JPG", "jpeg")
    (tmp_path / "c.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("x")
    files = image_files(tmp_path)
    assert [path.name for path in files] == ["a.png", "c.png", "b.JPG"]
    usable, problems = readable_images([*files, tmp_path / "gone.png"], 16)
    assert usable == [files[0], files[2]]
    assert [line.split(": ")[0] for line in problems] == [str(files[1]), str(tmp_path / "gone.png")]
    with pytest.raises(DataError, match=r"20x30 \(a\.png\) and 30x20 \(b\.JPG\).*reference_size=256"):
        readable_images(files, None)
    with pytest.raises(DataError, match="no image in it"):
        image_files(tmp_path / "nothing")


def test_the_hash_of_images_is_that_of_their_content(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    files = [tmp_path / "a", tmp_path / "b"]
    before = files_hash(files)
    assert before != files_hash(files[::-1]) != files_hash([*files, tmp_path / "gone"])
    (tmp_path / "b").write_bytes(b"changed")
    assert files_hash(files) != before
