"""What a benchmark gets: records and images that are kept as they are made, and never counted twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from factory import build
from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Record
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.images import image_facts, load_image
from symbiotic.schema import Objective, Sampler

OBJECTIVE = Objective(sampler=Sampler(steps=2))
CAPTIONS = ["red 7 on black bar top", "blue 1 on gray bar right", "white 0 on teal bar left"]


def context(corpus: Path, folder: Path | None, **more: Any) -> Context:
    return Context(Tokenizer.load(corpus / "tokenizer.json"), OBJECTIVE, folder=folder, **({"batch_size": 2} | more))


class Asked:
    """A `measure` that remembers what it was asked, and breaks after so many pieces."""

    def __init__(self, pieces: int = 99) -> None:
        self.items: list[int] = []
        self.pieces = pieces

    def __call__(self, some: Sequence[int]) -> list[Record]:
        if self.pieces == 0:
            raise KeyboardInterrupt
        self.pieces -= 1
        self.items += some
        return [{"id": item, "square": item * item, "text": "ß\u2028\n"} for item in some]


@pytest.mark.parametrize("damage", ["", '{"id": 4, "squ', '{"id": 4}', "[1]", "\x00"])
def test_an_interrupted_benchmark_goes_on_and_counts_nothing_twice(corpus: Path, tmp_path: Path, damage: str) -> None:
    whole = context(corpus, tmp_path / "whole").measured("x", range(7), Asked())
    with pytest.raises(KeyboardInterrupt):
        context(corpus, tmp_path / "cut").measured("x", range(7), Asked(pieces=2))
    with (tmp_path / "cut" / "x.jsonl").open("a") as file:
        file.write(damage)
    again, asked = context(corpus, tmp_path / "cut"), Asked()
    assert again.measured("x", range(7), asked) == whole == again.records
    assert asked.items == [4, 5, 6]
    assert (tmp_path / "cut" / "x.jsonl").read_bytes() == (tmp_path / "whole" / "x.jsonl").read_bytes()
    assert [record["id"] for record in whole] == list(range(7))
    finished = Asked(pieces=0)
    assert context(corpus, tmp_path / "cut").measured("x", range(7), finished) == whole


def test_records_in_memory_are_those_of_the_file(corpus: Path, tmp_path: Path) -> None:
    held = context(corpus, None).measured("x", range(3), Asked())
    assert held == context(corpus, tmp_path).measured("x", range(3), Asked())
    assert held == [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().split("\n") if line]


def test_a_share_lies_evenly_in_the_items(corpus: Path) -> None:
    items = list(range(10))
    assert context(corpus, None, share=0.25).chosen(items) == [0, 2, 5]
    assert context(corpus, None, share=0.25).chosen(items, limit=4) == [0]
    assert context(corpus, None, share=0.001).chosen(items) == [0]
    assert context(corpus, None).chosen(items, limit=4) == [0, 1, 2, 3]
    assert context(corpus, None).chosen([]) == context(corpus, None, share=0.5).chosen([]) == []
    kinds = [i % 2 for i in range(96)]  # seen and held-out captions take turns
    subjects = [i // 100 for i in range(5700)]
    for share in (0.5, 0.25, 0.1):
        some = context(corpus, None, share=share)
        assert abs(sum(some.chosen(kinds)) / len(some.chosen(kinds)) - 0.5) < 0.11
        counts = Counter(some.chosen(subjects))
        assert set(counts) == set(range(57))
        assert max(counts.values()) - min(counts.values()) <= 3


def test_items_that_cannot_be_prepared_are_named(corpus: Path) -> None:
    def prepare(item: int) -> int:
        if item == 2:
            raise DataError("item 2: broken")
        return -item

    here = context(corpus, None)
    assert here.kept([1, 2, 3], prepare) == ([1, 3], [-1, -3])
    assert here.problems == ["item 2: broken"]


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff: an image of floating-point numbers"):
        load_image(tmp_path / "float.tiff")


def test_a_gallery_is_drawn_once_and_says_what_it_was_made_from(corpus: Path, tmp_path: Path) -> None:
    model = build("symbiotic", vocab_size=512).eval()
    here = context(corpus, tmp_path, seed=3)
    made = here.gallery(model, "some", CAPTIONS)
    assert len(made) == 3
    assert made[-1].shape == (20, 20, 3)
    held = context(corpus, None, seed=3).gallery(model, "some", CAPTIONS)
    assert np.array_equal(made[:], held[:])
    with pytest.raises(IndexError):
        made[3]
    files = sorted((tmp_path / "images" / "some").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    facts = {"prompt": CAPTIONS[1], "seed": "3/1", "guidance": "2", "sampler": "euler, 2 steps, time shift 1"}
    assert image_facts(files[1]) == facts
    before = [file.read_bytes() for file in files]
    files[2].unlink()
    with torch.no_grad():
        again = context(corpus, tmp_path, seed=3).gallery(model, "some", CAPTIONS)
    assert [file.read_bytes() for file in files] == before
    assert np.array_equal(again[0:3], held[:])
    files[0].write_bytes(b"x")
    with pytest.raises(DataError, match=r"00000\.png: not a readable image"):
        again[0]
