"""Layouts of data that people have, as adapters: the JSON of a sample of theirs -> a record of ours (see `formats`).

    own          our records
    img2dataset  KEY.jpg with KEY.json and KEY.txt, in tars: a caption, to draw the image from (`task=t2i`, `t2i_long`)
                 or to say of it (`task=mmu`)
    llava        {id, image, conversations: [{from: human | gpt, value}]}; `<image>` in a text is where an image stands
    text         {text}
    interleaved  {texts: [text | null], images: [null | image]}, as OBELICS has it, or MMC4's {text_list, image_info}

`Origin` says which one, and where its files are. A sample of another form is refused by itself, with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from symbiotic.data.bad import Refused
from symbiotic.data.fit import Box, Fit
from symbiotic.schema import ConfigError

Raw = Mapping[str, Any]
Record = dict[str, Any]
TXT = ".txt"
"""Key of the text beside a record."""
FORMATS = ("own", "img2dataset", "llava", "text", "interleaved")
_PLACE = "<image>"
_SPEAKERS = {"human": False, "user": False, "system": False, "gpt": True, "assistant": True}  # whether it is learnt


@dataclass(frozen=True)
class Origin:
    """What a data set is made of.

    files: paths, folders or patterns. format: of `FORMATS`. images: a folder, or tars, that hold the images which
        records name; tars of samples hold their own.
    task: of img2dataset: `t2i`, `t2i_long`, or `mmu` (captioning, with `question` before the caption).
    text: key of the text. caption: key of the caption. fit, side: see `fit.Fit`.
    """

    files: tuple[str, ...]
    format: Literal["own", "img2dataset", "llava", "text", "interleaved"] = "own"
    images: tuple[str, ...] = ()
    task: Literal["t2i", "t2i_long", "mmu"] = "t2i"
    question: str = ""
    text: str = "text"
    caption: str = "caption"
    fit: Literal["none", "crop", "keep"] = "none"
    side: int = 0

    def check(self, key: str) -> None:
        """Raises ConfigError: an option that is wrong or has no effect. key: prefix of its keys in messages."""
        Fit(self.fit, self.side).check(key)
        belongs = {"task": "img2dataset", "question": "img2dataset", "caption": "img2dataset", "text": "text"}
        for name, owner in belongs.items():
            value = getattr(self, name)
            if value != getattr(Origin, name) and self.format != owner:
                raise ConfigError(f"{key}{name}={value}: has no effect with format={self.format}; it is of {owner}")
        if self.question and self.task != "mmu":
            raise ConfigError(f"{key}question={self.question}: has no effect with task={self.task}; task=mmu asks it")
        if self.fit != "none" and self.format in ("own", "text"):
            raise ConfigError(f"{key}fit={self.fit}: has no effect with format={self.format}")
        if self.images and self.format not in ("llava", "interleaved"):
            raise ConfigError(f"{key}images: has no effect with format={self.format}; it is of llava and interleaved")

    @property
    def adapter(self) -> Adapter | None:
        return None if self.format == "own" else ADAPTERS[self.format]


class Adapter(NamedTuple):
    """record: (their JSON, places of the sample's images, options) -> our record. refs: images that it names.

    texts: whether KEY.txt is read too. several: whether a sample may have several images. splits: whether texts longer
    than a row are cut into several samples.
    """

    record: Callable[[Raw, Sequence[Box], Origin], Record]
    refs: Callable[[Raw], list[str]]
    texts: bool = False
    several: bool = False
    splits: bool = False


def _img2dataset(raw: Raw, boxes: Sequence[Box], origin: Origin) -> Record:
    caption = raw.get(origin.caption) or raw.get(TXT)
    if caption is None:
        raise Refused("missing_key", f"neither {origin.caption} in the record nor a KEY.txt holds a caption")
    caption = _text(origin.caption, caption).strip()
    if origin.task != "mmu":
        return {"task": origin.task, "caption": caption, **_size(boxes)}
    asked = [{"text": origin.question}] if origin.question else []
    return _parted([_image(boxes[0]), *asked, {"text": caption, "loss": True, "end": True}], boxes)


def _llava(raw: Raw, boxes: Sequence[Box], origin: Origin) -> Record:
    turns = raw.get("conversations", raw.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise Refused("missing_key", "a conversation needs the key conversations, a list of turns")
    said = [_turn(turn) for turn in turns]
    places = sum(text.count(_PLACE) for _, text in said)
    if places not in (0, len(boxes)):
        kind = "missing_image" if places > len(boxes) else "several_images"
        raise Refused(kind, f"{places} {_PLACE} in its texts and {len(boxes)} images")
    parts = [_image(box) for box in boxes] if not places else []
    rest = iter(boxes)
    for learnt, text in said:
        parts += list(_placed(text, rest)) if not learnt else [{"text": text.strip(), "loss": True, "end": True}]
    return _parted(parts, boxes)


def _turn(turn: Any) -> tuple[bool, str]:
    """Whether it is learnt, and what is said."""
    if not isinstance(turn, dict):
        raise Refused("wrong_type", f"a turn is of type {type(turn).__name__}; must be an object")
    who = turn.get("from", turn.get("role"))
    if who not in _SPEAKERS:
        raise Refused("missing_key", f"a turn from {who!r}; must be from one of {', '.join(_SPEAKERS)}")
    text = _text("value", turn.get("value", turn.get("content")))
    if _SPEAKERS[who] and _PLACE in text:
        raise Refused("special_token", f"an answer spells {_PLACE}")
    return _SPEAKERS[who], text


def _placed(text: str, boxes: Iterator[Box]) -> Iterator[Record]:
    for number, words in enumerate(text.split(_PLACE)):
        if number:
            yield _image(next(boxes))
        if words.strip():
            yield {"text": words.strip()}


def _plain_text(raw: Raw, boxes: Sequence[Box], origin: Origin) -> Record:
    if origin.text not in raw:
        raise Refused("missing_key", f"a record without the key {origin.text}")
    return {"task": "lm", "text": _text(origin.text, raw[origin.text])}


def _interleaved(raw: Raw, boxes: Sequence[Box], origin: Origin) -> Record:
    items = _document(raw)
    named = sum(image is not None for _, image in items)
    if named != len(boxes):
        kind = "missing_image" if named > len(boxes) else "several_images"
        raise Refused(kind, f"its document has {named} images, {len(boxes)} are there")
    rest = iter(boxes)
    parts = [_image(next(rest)) if image is not None else {"text": text, "loss": True} for text, image in items]
    return _parted(parts, boxes)


def _document(raw: Raw) -> list[tuple[str, str | None]]:
    """(text, None) and ("", name of an image), in order."""
    if "text_list" in raw:
        return list(_mmc4(raw))
    texts, images = raw.get("texts"), raw.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise Refused("missing_key", "a document needs the keys texts and images, two lists of one length")
    items: list[tuple[str, str | None]] = []
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            items.append(("", _text("images", image)))
        if text is not None and _text("texts", text).strip():
            items.append((text.strip(), None))
    return items


def _mmc4(raw: Raw) -> Iterator[tuple[str, str | None]]:
    """MMC4: every image stands before the text that it is matched with."""
    texts, images = raw["text_list"], raw.get("image_info", [])
    if not isinstance(texts, list) or not isinstance(images, list):
        raise Refused("wrong_type", "text_list and image_info must be lists")
    before: dict[int, list[str]] = {}
    for image in images:
        if not isinstance(image, dict) or type(image.get("matched_text_index")) is not int:
            raise Refused("missing_key", "an entry of image_info needs the key matched_text_index")
        before.setdefault(image["matched_text_index"], []).append(_text("image_name", image.get("image_name")))
    for number, text in enumerate(texts):
        yield from (("", name) for name in before.get(number, ()))
        if _text("text_list", text).strip():
            yield text.strip(), None


def _named(raw: Raw) -> list[str]:
    """LLaVA's images: one name, a list of them, or none."""
    found = raw.get("image", raw.get("images"))
    names = found if isinstance(found, list) else [found] if found else []
    return [_text("image", name) for name in names]


def _document_images(raw: Raw) -> list[str]:
    return [image for _, image in _document(raw) if image is not None]


def _none(raw: Raw) -> list[str]:
    return []


ADAPTERS = {
    "img2dataset": Adapter(_img2dataset, _none, texts=True),
    "llava": Adapter(_llava, _named, several=True),
    "text": Adapter(_plain_text, _none, splits=True),
    "interleaved": Adapter(_interleaved, _document_images, several=True),
}


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused("wrong_type", f"{key} is of type {type(value).__name__}; must be str")
    return value


def _image(box: Box) -> Record:
    return {"image": list(box)}


def _size(boxes: Sequence[Box]) -> Record:
    """Of all images, one below the other; nothing without any."""
    if not boxes:
        return {}
    return {"height": boxes[-1].top + boxes[-1].height, "width": max(box.width for box in boxes)}


def _parted(parts: list[Record], boxes: Sequence[Box]) -> Record:
    return {"task": "mmu" if boxes else "lm", "parts": parts, **_size(boxes)}


def pieces(record: Record, encode: Callable[[str], list[int]], row_tokens: int) -> Iterator[Record]:
    """A record of plain text as several that fit a row each, cut between words; any other record as it is.

    encode: text -> ids. A word that alone is too long for a row is left out.
    """
    room = row_tokens - 2  # <bos>, <eos>
    if record.get("task") != "lm" or "text" not in record or len(encode(record["text"])) <= room:
        yield record
        return
    begun: list[str] = []
    used = 0
    for word in re.findall(r"\S+\s*", record["text"]):
        length = len(encode(word))
        if begun and used + length > room:
            yield {**record, "text": "".join(begun).strip()}
            begun, used = [], 0
        if length <= room:
            begun.append(word)
            used += length
    if begun:
        yield {**record, "text": "".join(begun).strip()}
