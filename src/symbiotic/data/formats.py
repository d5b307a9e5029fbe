"""Sequence formats: how a record of a shard, or a row of a benchmark, becomes a `Sample`.

    lm        <bos> words... <eos>                       statement: loss on every token; question: on the answer
    mmu       <bos> <image> [vit] </image> question answer <eos>               loss on the answer and <eos>
    parts     <bos> text | <image> [vit] </image> ... <eos>    of lm and mmu, in any order; loss where a part says so
    t2i(_long)<bos> caption <gen> [latents]              loss on caption and <gen>; flow loss on the latents
    dropped   <bos> <null> <gen> [latents]               no text loss; also the unconditional half of guidance

A record is the JSON of one shard member: `task`, and by task `text` | `prompt`, `answer` | `question`, `answer`,
`height`, `width` | `caption`, `height`, `width`. In the place of its texts a record of lm or mmu may have `parts`, a
list of `{text, loss, end}` (end: `<eos>` follows, as after each answer of a conversation) and of `{image: [top, height,
width]}`: the images of a sample are one image, one below the other. Further keys say where the sample comes from.
Leaving the answer out gives the same sequence as a prefix to continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from symbiotic.data.errors import DataError
from symbiotic.data.packing import (
    GENERATION_TASKS,
    Array,
    GenImage,
    Part,
    ReadImage,
    Sample,
    Text,
    build_sample,
)
from symbiotic.data.tokenizer import BOS, EOS, GEN, IMAGE, IMAGE_END, LETTERS, NULL, Tokenizer
from symbiotic.models.batch import IGNORE, PROMPT
from symbiotic.schema import TASKS


class Counts(NamedTuple):
    """Sizes of a sample, and what is left of them when its caption is dropped."""

    tokens: int
    ce: int  # next-token targets
    latents: int
    dropped_tokens: int
    dropped_ce: int


def render_knowledge_prompt(question: str, choices: Sequence[str]) -> str:
    """A four-choice question in words, up to the place where the answer letter is predicted."""
    options = " ".join(f"{letter} {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{question} {options} answer"


def statement_parts(text: str, tokenizer: Tokenizer) -> list[Part]:
    """A plain sentence, loss on every token."""
    return [Text([BOS]), Text([*tokenizer.encode(text), EOS], loss=True)]


def question_parts(prompt: str, tokenizer: Tokenizer, answer: str | None = None) -> list[Part]:
    """A question in words (see `render_knowledge_prompt`), with loss on the answer and `<eos>`."""
    return [Text([BOS, *tokenizer.encode(prompt)]), *_answer(answer, tokenizer)]


def reading_parts(pixels: Array, question: str, tokenizer: Tokenizer, answer: str | None = None) -> list[Part]:
    """An image uint8 [H, W, 3] and a question about it."""
    words = Text([IMAGE_END, *tokenizer.encode(question)])
    return [Text([BOS, IMAGE]), ReadImage(pixels), words, *_answer(answer, tokenizer)]


def generation_parts(pixels: Array, caption: str | None, tokenizer: Tokenizer) -> list[Part]:
    """A caption (None: dropped) and the image uint8 [H, W, 3] that it describes."""
    if caption is None:
        return [Text([BOS, NULL, GEN]), GenImage(pixels)]
    return [Text([BOS]), Text([*tokenizer.encode(caption), GEN], loss=True), GenImage(pixels)]


def mixed_parts(items: Sequence[Mapping[str, Any]], pixels: Array | None, tokenizer: Tokenizer) -> list[Part]:
    """The `parts` of a record, whose images lie in `pixels`, uint8 [H, W, 3]; `<eos>` is learnt at the end.

    Raises:
        DataError: an image part of a sample without an image.
    """
    parts: list[Part] = [Text([BOS])]
    for item in items:
        if "image" not in item:
            ids = tokenizer.encode(item["text"])
            parts.append(Text([*ids, EOS] if item.get("end") else ids, loss=bool(item.get("loss"))))
            continue
        if pixels is None:
            raise DataError("a part is an image, and the sample has none")
        top, height, width = item["image"]
        parts += [Text([IMAGE]), ReadImage(pixels[top : top + height, :width]), Text([IMAGE_END])]
    return parts if items and items[-1].get("end") else [*parts, Text([EOS], loss=True)]


def _answer(answer: str | None, tokenizer: Tokenizer) -> list[Part]:
    return [] if answer is None else [Text([*tokenizer.encode(answer), EOS], loss=True)]


def record_parts(record: Mapping[str, Any], pixels: Array | None, tokenizer: Tokenizer) -> list[Part]:
    """The parts of a shard's record.

    Args:
        pixels: uint8 [H, W, 3] of the member's image, None for text records.

    Raises:
        DataError: unknown task, a key that is missing or is no text, or an image that is missing.
    """
    task = record.get("task")
    try:
        if task in ("lm", "mmu") and "parts" in record:
            return mixed_parts(record["parts"], pixels, tokenizer)
        if task == "lm" and "text" in record:
            return statement_parts(record["text"], tokenizer)
        if task == "lm":
            return question_parts(record["prompt"], tokenizer, record["answer"])
        if task not in TASKS:
            raise DataError(f"task {task!r} is none of {', '.join(TASKS)}")
        if pixels is None:
            raise DataError(f"a record of task {task} needs an image")
        if task == "mmu":
            return reading_parts(pixels, record["question"], tokenizer, record["answer"])
        return generation_parts(pixels, record["caption"], tokenizer)
    except KeyError as error:
        raise DataError(f"a record of task {task} needs the key {error}") from error
    except TypeError as error:
        raise DataError(f"a record of task {task} has a value that is no text") from error


def record_sample(key: str, record: Mapping[str, Any], pixels: Array | None, tokenizer: Tokenizer) -> Sample:
    """A shard's record as a `Sample`, caption kept. Raises `DataError` as `record_parts` does."""
    parts = record_parts(record, pixels, tokenizer)
    return build_sample(key, record["task"], parts)


def measure(record: Mapping[str, Any], tokenizer: Tokenizer, patch: int = 4) -> Counts:
    """Counts of a record, from its words and its `height` and `width`, without reading the image."""
    tokens = ce = latents = 0
    for part in _shaped_parts(record, tokenizer):
        if isinstance(part, Text):
            tokens += len(part.ids)
            ce += len(part.ids) * part.loss
            continue
        height, width = part.pixels.shape[:2]
        patches = (height // patch) * (width // patch)
        tokens += patches
        latents += patches * isinstance(part, GenImage)
    if record["task"] in GENERATION_TASKS:
        return Counts(tokens, ce, latents, 3 + latents, 0)
    return Counts(tokens, ce, latents, tokens, ce)


def read_sizes(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(height, width) of each image of a record that the model reads, from its `height` and `width`."""
    parts = [part for part in _shaped_parts(record, tokenizer) if isinstance(part, ReadImage)]
    return [(part.pixels.shape[0], part.pixels.shape[1]) for part in parts]


def _shaped_parts(record: Mapping[str, Any], tokenizer: Tokenizer) -> list[Part]:
    """The parts of a record whose images have a shape and nothing in it."""
    size = (*image_size(record), 3)
    shape_only = np.broadcast_to(np.uint8(0), size) if any(size[:2]) else None
    return record_parts(record, shape_only, tokenizer)


def image_size(record: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels that a record announces; (0, 0) where it announces none.

    Raises:
        DataError: one of the two is missing or is no positive whole number.
    """
    if "height" not in record and "width" not in record:
        return 0, 0
    height, width = record.get("height"), record.get("width")
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise DataError(f"height {height!r} and width {width!r} must both be positive whole numbers")
    return height, width


def drop_caption(sample: Sample) -> Sample:
    """The same generation sample without its caption: `<bos> <null> <gen> [latents]`."""
    latents = len(sample.latents)
    head = np.array([BOS, NULL, GEN], dtype=np.int64)
    return replace(
        sample,
        tokens=np.concatenate([head, sample.tokens[-latents:]]),
        kind=np.concatenate([np.full(3, PROMPT), sample.kind[-latents:]]),
        span=np.concatenate([np.full(3, -1), sample.span[-latents:]]),
        causal=np.concatenate([np.zeros(3, dtype=bool), sample.causal[-latents:]]),
        target=np.full(3 + latents, IGNORE),
    )
