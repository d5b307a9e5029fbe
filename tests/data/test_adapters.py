"""Layouts that people have: what becomes of a sample, token by token; what is no such sample says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from people import TOKENIZER, conversation, document, picture
from symbiotic.data.adapters import ADAPTERS, Origin, pieces
from symbiotic.data.bad import Refused
from symbiotic.data.fit import Box, Fit, boxes_of, strip
from symbiotic.data.formats import measure, record_sample
from symbiotic.data.records import check_record
from symbiotic.data.tokenizer import BOS, EOS, IMAGE, IMAGE_END
from symbiotic.models.batch import IGNORE, VIT
from symbiotic.schema import ConfigError

BOX = [Box(0, 8, 12)]
TWO = [Box(0, 8, 12), Box(8, 16, 8)]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def laid_out(record: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens, -1 where a patch stands; and the tokens that are learnt."""
    check_record(record)
    size = (record.get("height", 0), record.get("width", 0), 3)
    sample = record_sample("x", record, np.zeros(size, np.uint8) if size[0] else None, TOKENIZER)
    counts = measure(record, TOKENIZER)
    assert (counts.tokens, counts.ce) == (len(sample), int((sample.target != IGNORE).sum()))
    return np.where(sample.kind == VIT, -1, sample.tokens).tolist(), sample.target[sample.target != IGNORE].tolist()


def adapted(name: str, raw: dict[str, Any], boxes: list[Box], **options: Any) -> dict[str, Any]:
    return ADAPTERS[name].record(raw, boxes, Origin(("x",), name, **options))  # type: ignore[arg-type]


def test_a_conversation_learns_every_answer_and_nothing_else() -> None:
    tokens, learnt = laid_out(adapted("llava", conversation(12), BOX))
    said = [*ids("what is this"), *ids("a number 12"), EOS, *ids("what is the color"), *ids("red"), EOS]
    assert tokens == [BOS, IMAGE, *[-1] * 6, IMAGE_END, *said]
    assert learnt == [*ids("a number 12"), EOS, *ids("red"), EOS]
    tokens, learnt = laid_out(adapted("llava", conversation(5), []))  # of text alone
    assert tokens[: 1 + len(ids("what is this"))] == [BOS, *ids("what is this")]


def test_images_stand_where_the_text_has_them() -> None:
    turns = [{"from": "human", "value": "is <image> red and <image> blue"}, {"from": "gpt", "value": "it is"}]
    tokens, _ = laid_out(adapted("llava", {"conversations": turns}, TWO))
    first, second = [IMAGE, *[-1] * 6, IMAGE_END], [IMAGE, *[-1] * 8, IMAGE_END]
    expected = [BOS, *ids("is"), *first, *ids("red and"), *second, *ids("blue"), *ids("it is"), EOS]
    assert tokens == expected
    unmarked = {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]}
    assert laid_out(adapted("llava", unmarked, BOX))[0] == [BOS, *first, *ids("what"), *ids("red"), EOS]


def test_a_document_learns_all_of_its_text() -> None:
    tokens, learnt = laid_out(adapted("interleaved", document(3), TWO))
    first, second = [IMAGE, *[-1] * 6, IMAGE_END], [IMAGE, *[-1] * 8, IMAGE_END]
    assert tokens == [BOS, *ids("a photo of"), *first, *ids("and then"), *second, EOS]
    assert learnt == [*ids("a photo of"), *ids("and then"), EOS]
    mmc4 = {"text_list": ["it is red", "and blue"], "image_info": [{"image_name": "x.jpg", "matched_text_index": 1}]}
    assert ADAPTERS["interleaved"].refs(mmc4) == ["x.jpg"]
    assert laid_out(adapted("interleaved", mmc4, BOX))[0] == [BOS, *ids("it is red"), *first, *ids("and blue"), EOS]


def test_captions_are_drawn_from_or_said() -> None:
    raw = {"caption": "red", ".txt": "blue"}
    assert adapted("img2dataset", raw, BOX) == {"task": "t2i", "caption": "red", "height": 8, "width": 12}
    assert adapted("img2dataset", {".txt": " blue\n"}, BOX, task="t2i_long")["caption"] == "blue"
    asked = adapted("img2dataset", raw, BOX, task="mmu", question="what is this")
    image = [IMAGE, *[-1] * 6, IMAGE_END]
    assert laid_out(asked) == ([BOS, *image, *ids("what is this"), *ids("red"), EOS], [*ids("red"), EOS])
    assert laid_out(adapted("img2dataset", raw, BOX, task="mmu"))[0] == [BOS, *image, *ids("red"), EOS]


@pytest.mark.parametrize(
    ("name", "raw", "boxes", "kind"),
    [
        ("img2dataset", {"url": "x"}, BOX, "missing_key"),
        ("img2dataset", {"caption": 5}, BOX, "wrong_type"),
        ("img2dataset", {"caption": "<gen>"}, BOX, "special_token"),
        ("text", {"body": "red"}, [], "missing_key"),
        ("text", {"text": None}, [], "wrong_type"),
        ("text", {"text": " "}, [], "empty_text"),
        ("llava", {"id": 1}, [], "missing_key"),
        ("llava", {"conversations": ["red"]}, [], "wrong_type"),
        ("llava", {"conversations": [{"from": "cat", "value": "x"}]}, [], "missing_key"),
        ("llava", {"conversations": [{"from": "human", "value": "<image> x"}]}, [], "missing_image"),
        ("llava", {"conversations": [{"from": "human", "value": "<image> x"}]}, TWO, "several_images"),
        ("llava", {"conversations": [{"from": "gpt", "value": "<image>"}]}, BOX, "special_token"),
        ("llava", {"conversations": [{"from": "human", "value": "what"}]}, BOX, "missing_key"),
        ("interleaved", {"texts": ["a"], "images": []}, [], "missing_key"),
        ("interleaved", document(1), BOX, "missing_image"),
        ("interleaved", {"texts": ["a"], "images": [None]}, BOX, "several_images"),
        ("interleaved", {"text_list": ["a"], "image_info": [{}]}, [], "missing_key"),
    ],
)
def test_what_is_no_such_sample_is_refused_by_kind(name: str, raw: Any, boxes: list[Box], kind: str) -> None:
    with pytest.raises(Refused) as caught:
        check_record(adapted(name, raw, boxes))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ([], "missing_key"),
        ("red", "wrong_type"),
        ([{"text": "red", "image": [0, 4, 4]}], "wrong_type"),
        ([{"text": 5, "loss": True}], "wrong_type"),
        ([{"text": "red"}, {"image": [0, 4, 4]}], "missing_key"),
        ([{"text": "red", "loss": True}], "missing_image"),
        ([{"text": "red", "loss": True}, {"image": [8, 8, 4]}], "image_size_mismatch"),
        ([{"text": "red", "loss": True}, {"image": [0, 6, 4]}], "image_patches"),
        ([{"text": "red", "loss": True}, {"image": [0, 4]}], "wrong_type"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts: Any, kind: str) -> None:
    with pytest.raises(Refused) as caught:
        check_record({"task": "mmu", "parts": parts, "height": 8, "width": 8})
    assert caught.value.kind == kind


def test_long_texts_are_cut_between_words_and_nothing_is_lost() -> None:
    text = "this is number 12345 and it is red\n then blue"
    cut = list(pieces({"task": "lm", "text": text, "from": "x"}, TOKENIZER.encode, 8))
    assert [ids(piece["text"]) for piece in cut] != [ids(text)]
    assert [token for piece in cut for token in ids(piece["text"])] == ids(text)
    assert all(measure(piece, TOKENIZER).tokens <= 8 for piece in cut)
    assert all(piece["from"] == "x" for piece in cut)
    assert list(pieces({"task": "lm", "text": "red"}, TOKENIZER.encode, 8)) == [{"task": "lm", "text": "red"}]


@pytest.mark.parametrize("mode", ["none", "crop", "keep"])
def test_the_size_is_known_before_an_image_is_decoded(mode: Any) -> None:
    fit = Fit(mode, 0 if mode == "none" else 12)
    for number, (height, width) in enumerate([(24, 16), (8, 8), (40, 100), (400, 4)]):
        for kind in ("png", "jpeg", "webp"):
            body = picture(number, height, width, kind=kind)
            boxes = boxes_of([body], fit)
            pixels = strip([body], boxes, fit)
            assert pixels.shape == (boxes[0].height, boxes[0].width, 3)
            assert not pixels.shape[0] % 4
            assert not pixels.shape[1] % 4
            assert np.abs(pixels.astype(int) - np.array([number * 37 % 256, number * 91 % 256, 120])).max() < 8
    assert fit.size(40, 100) == {"none": (40, 100), "crop": (12, 12), "keep": (4, 12)}[mode]


def test_the_middle_is_kept_and_modes_become_rgb() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert (Fit("crop", 8).pixels(Image.fromarray(pixels)) == 200).all()
    for mode, kind in (("L", "jpeg"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpeg"), ("LA", "png"), ("1", "png")):
        assert strip([picture(0, mode=mode, kind=kind)], BOX, Fit("crop", 8)).shape == (8, 8, 3)
    two = [picture(1, 8, 12), picture(2, 16, 8)]
    joined = strip(two, boxes_of(two, Fit()), Fit())
    assert boxes_of(two, Fit()) == TWO
    assert joined.shape == (24, 12, 3)
    assert not joined[8:, 8:].any()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"fit": "crop"}, r"s\.side=0: must be a multiple of 4 pixels with fit=crop"),
        ({"side": 8}, r"s\.side=8: has no effect with fit=none"),
        ({"format": "text", "fit": "crop", "side": 8}, r"s\.fit=crop: has no effect with format=text"),
        ({"format": "llava", "task": "mmu"}, r"s\.task=mmu: has no effect with format=llava; it is of img2dataset"),
        ({"format": "img2dataset", "question": "what"}, r"s\.question=what: has no effect with task=t2i"),
        ({"format": "text", "images": ("x",)}, r"s\.images: has no effect with format=text"),
    ],
)
def test_options_without_effect_are_refused(options: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Origin(("x",), **options).check("s.")
