"""Records: the JSON of a sample, and what a task asks of it before anything else is looked at (see `formats`)."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any

from symbiotic.data.bad import Refused
from symbiotic.data.tokenizer import SPECIALS
from symbiotic.schema import TASKS

MAX_DEPTH = 64
"""Lists and objects in one another that a record may have."""

_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', re.DOTALL)

PATCH = 4
"""Pixels along a patch: what `formats` and `packing` cut images into."""


def parse_record(body: bytes, strict: bool = True) -> dict[str, Any]:
    """The JSON object of a record. strict: without NaN and infinities, which records of others may hold.

    Raises:
        Refused: no UTF-8, no JSON, no object, or one that says a key twice.
    """
    try:
        text = body.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise Refused("text_not_utf8", str(error)) from error
    check_depth(text)
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant if strict else float)
    except (ValueError, RecursionError) as error:
        raise Refused("not_json", str(error)) from error
    if not isinstance(record, dict):
        raise Refused("json_not_object", f"must be a JSON object, not {type(record).__name__}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Refused("repeated_json_key", f"{key} is said twice")
        found[key] = value
    return found


def check_depth(text: str) -> None:
    """Raises Refused: lists or objects in one another, deeper than any record has them; found in one pass, before they
    are parsed."""
    depth = 0
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    for found in _BRACKETS.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > MAX_DEPTH:
            raise Refused("not_json", f"nested deeper than {MAX_DEPTH} at character {found.start()}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def check_record(record: Mapping[str, Any]) -> None:
    """What a task needs (see `formats`): its texts, and the size of its image.

    Raises:
        Refused: an unknown task, or a value that is missing or wrong.
    """
    task = record.get("task")
    if task not in TASKS:
        raise Refused("unknown_task", f"task {task!r} is none of {', '.join(TASKS)}")
    for key in _texts_of(record):
        check_text(key, _value(record, key, str))
    for key in ("height", "width") if task != "lm" else ():
        if _value(record, key, int) < 1:
            raise Refused("bad_size", f"{key} {record[key]} must be positive")
    if "parts" in record and task in ("lm", "mmu"):
        _check_parts(record)


def _check_parts(record: Mapping[str, Any]) -> None:
    """Raises Refused: a part that is none, an image outside the sample's, or nothing to learn or to read."""
    parts = _value(record, "parts", list)
    for part in parts:
        if not isinstance(part, dict) or ("image" in part) == ("text" in part):
            raise Refused("wrong_type", "each of its parts must be an object with either text or image")
        if "text" in part:
            check_text("a part", _value({**part, "task": record["task"]}, "text", str))
        else:
            _check_box(part["image"], record)
    if not any(part.get("loss") for part in parts):
        raise Refused("missing_key", "none of its parts has the key loss: there is nothing to learn")
    if record["task"] == "mmu" and not any("image" in part for part in parts):
        raise Refused("missing_image", "none of its parts is an image")


def _check_box(box: Any, record: Mapping[str, Any]) -> None:
    if not (isinstance(box, list) and len(box) == 3 and all(type(number) is int for number in box)):
        raise Refused("wrong_type", "the image of a part must be [top, height, width]")
    top, height, width = box
    if record["task"] == "lm" or top < 0 or top + height > record["height"] or width > record["width"]:
        raise Refused("image_size_mismatch", f"the image {box} of a part lies outside the image of the sample")
    if height < 1 or width < 1 or height % PATCH or width % PATCH:
        raise Refused("image_patches", f"{height} x {width} does not divide into patches of {PATCH} x {PATCH}")


def _texts_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    if "parts" in record and record["task"] in ("lm", "mmu"):
        return ()
    if record["task"] == "lm":
        return ("text",) if "text" in record else ("prompt", "answer")
    return ("question", "answer") if record["task"] == "mmu" else ("caption",)


def _value(record: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise Refused("missing_key", f"a record of task {record['task']} needs the key {key}")
    if type(record[key]) is not kind:  # True is no number
        raise Refused("wrong_type", f"{key} is of type {type(record[key]).__name__}; must be {kind.__name__}")
    return record[key]


def check_text(key: str, text: str) -> None:
    """Raises Refused: no word, half a character, or a special token spelt out."""
    if not text.strip():
        raise Refused("empty_text", f"{key} holds no word")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("half_character", f"{key}: {error}") from error
    if spelt := next((special for special in SPECIALS if special in text), None):
        raise Refused("special_token", f"{key} spells {spelt}")
