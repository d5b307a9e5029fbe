"""Samples as token sequences, packed into the rows of a `Batch`.

Shapes: n tokens of a sample, v patches that it reads, l latents that it generates, P numbers a patch.
Targets stand at the place that predicts: `target[i]` is token i + 1 where that one carries a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from symbiotic.data.errors import DataError
from symbiotic.models.batch import IGNORE, PROMPT, TEXT, VAE, VIT, Batch
from symbiotic.schema import TASKS

GENERATION_TASKS = ("t2i", "t2i_long")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Text:
    """Words or special tokens. loss: each of them is a target."""

    ids: list[int]
    loss: bool = False


@dataclass(frozen=True)
class ReadImage:
    """An image that the model reads: uint8 [H, W, 3]."""

    pixels: Array


@dataclass(frozen=True)
class GenImage:
    """An image that the model generates: uint8 [H, W, 3]. Its latents are the patches of its pixels."""

    pixels: Array


Part = Text | ReadImage | GenImage


@dataclass
class Sample:
    """One sample, ready to pack."""

    key: str
    task: int  # index in schema.TASKS
    tokens: Array  # [n] int64, 0 at patches
    kind: Array  # [n] int64
    span: Array  # [n] int64: number of the image inside the sample, -1 outside
    causal: Array  # [n] bool
    target: Array  # [n] int64: next token, or IGNORE
    vit_patches: Array  # [v, P] float32 in [-1, 1]
    vit_grid: Array  # [v, 2] int64: row, column
    latents: Array  # [l, P] float32; [l, 0] with codes
    latent_grid: Array  # [l, 2] int64
    codes: Array  # [l] int64 of an image tokenizer; [0] without

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))


def patch_pixels(pixels: Array, patch: int) -> tuple[Array, Array]:
    """uint8 [H, W, C] -> patches [h*w, p*p*C] float32 in [-1, 1], row-major; and their grid places [h*w, 2].

    The order inside a patch is (y, x, channel), as in `models.embeddings.patchify`.

    Raises:
        DataError: not uint8 with three axes, or a side that is no multiple of the patch.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise DataError(f"an image must be uint8 [height, width, channels], not {pixels.dtype} {list(pixels.shape)}")
    height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise DataError(f"an image of {height}x{width} pixels does not divide into patches of {patch}x{patch}")
    h, w = height // patch, width // patch
    blocks = pixels.reshape(h, patch, w, patch, channels).transpose(0, 2, 1, 3, 4)
    patches = blocks.reshape(h * w, patch * patch * channels).astype(np.float32)
    patches *= np.float32(1 / 127.5)
    patches -= np.float32(1)
    return patches, _grid(h, w)


def _grid(h: int, w: int) -> Array:
    return np.stack([np.arange(h).repeat(w), np.tile(np.arange(w), h)], axis=1)


def build_sample(key: str, task: int | str, parts: Sequence[Part], patch: int = 4) -> Sample:
    """Lay the parts out as one sequence and derive kinds, spans, targets.

    Args:
        task: name or index in `schema.TASKS`; the text of generation tasks has kind PROMPT.

    Raises:
        DataError: an image that does not fit the patch size; the line names the sample.
    """
    number = TASKS.index(task) if isinstance(task, str) else task
    text_kind = PROMPT if TASKS[number] in GENERATION_TASKS else TEXT
    tokens: list[int] = []
    kind: list[int] = []
    span: list[int] = []
    loss: list[bool] = []
    pictures: dict[int, list[tuple[Array, Array]]] = {VIT: [], VAE: []}
    for part in parts:
        if isinstance(part, Text):
            n = len(part.ids)
            tokens += part.ids
            kind += [text_kind] * n
            span += [-1] * n
            loss += [part.loss] * n
            continue
        try:
            patches, grid = patch_pixels(part.pixels, patch)
        except DataError as error:
            raise DataError(f"sample {key}: {error}") from error
        n, this = len(patches), VIT if isinstance(part, ReadImage) else VAE
        span += [len(pictures[VIT]) + len(pictures[VAE])] * n
        tokens += [0] * n
        kind += [this] * n
        loss += [False] * n
        pictures[this].append((patches, grid))
    vit_patches, vit_grid = _join(pictures[VIT], patch)
    latents, latent_grid = _join(pictures[VAE], patch)
    ids = np.array(tokens, dtype=np.int64)
    return Sample(
        key=key,
        task=number,
        tokens=ids,
        kind=np.array(kind, dtype=np.int64),
        span=np.array(span, dtype=np.int64),
        causal=np.zeros(len(ids), dtype=bool),
        target=_targets(ids, np.array(loss, dtype=bool)),
        vit_patches=vit_patches,
        vit_grid=vit_grid,
        latents=latents,
        latent_grid=latent_grid,
        codes=np.zeros(0, dtype=np.int64),
    )


def with_codes(sample: Sample, codes: Array) -> Sample:
    """The sample with its generated images as codes [l], which are causal inside an image, in the place of patches.

    Raises:
        DataError: another number of codes than of latents.
    """
    if len(codes) != len(sample.latents):
        raise DataError(f"sample {sample.key}: {len(codes)} codes for images of {len(sample.latents)} patches")
    return replace(
        sample,
        latents=sample.latents[:, :0],
        codes=np.asarray(codes, dtype=np.int64),
        causal=sample.kind == VAE,
    )


def before_image(sample: Sample) -> Sample:
    """What stands before the generated image, which ends the sample."""
    latents = len(sample.latents)
    words = {name: getattr(sample, name)[:-latents] for name in ("tokens", "kind", "span", "causal", "target")}
    images = {name: getattr(sample, name)[:0] for name in ("latents", "latent_grid", "codes")}
    return replace(sample, **words, **images)


def _targets(tokens: Array, loss: Array) -> Array:
    target = np.full(len(tokens), IGNORE, dtype=np.int64)
    target[:-1][loss[1:]] = tokens[1:][loss[1:]]
    return target


def _join(pictures: list[tuple[Array, Array]], patch: int) -> tuple[Array, Array]:
    if not pictures:
        return np.zeros((0, patch * patch * 3), np.float32), np.zeros((0, 2), np.int64)
    if len(pictures) == 1:
        return pictures[0]
    return np.concatenate([p for p, _ in pictures]), np.concatenate([g for _, g in pictures])


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: rows of sample numbers whose lengths sum to at most `row_tokens`. Deterministic.

    Raises:
        DataError: a sample that is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        if length > row_tokens:
            raise DataError(f"a sample of {length} tokens does not fit a row: data.row_tokens={row_tokens}")
        for row, free in enumerate(room):
            if length <= free:
                rows[row].append(number)
                room[row] -= length
                break
        else:
            rows.append([number])
            room.append(row_tokens - length)
    return rows


def collate(
    samples: Sequence[Sample],
    row_tokens: int,
    *,
    times: Sequence[float] | None = None,
    noises: Sequence[Array] | None = None,
    ce_norm: float | None = None,
    flow_norm: float | None = None,
    rows: list[list[int]] | None = None,
) -> Batch:
    """Pack samples into one `Batch` of width `row_tokens`.

    Args:
        times: flow time of each sample (default 0: latents are the clean data).
        noises: [l, P] of each sample (default 0).
        ce_norm, flow_norm: normalisers of the losses (default: this batch's own counts, at least 1).
        rows: sample numbers by row, as from `pack` (the default).

    Raises:
        DataError: no samples, or one that is longer than a row.
    """
    if not samples:
        raise DataError("a batch needs at least one sample")
    rows = rows if rows is not None else pack([len(s) for s in samples], row_tokens)
    order = [number for row in rows for number in row]
    chosen = [samples[number] for number in order]
    place = _Places(rows, samples, row_tokens)
    latents = np.concatenate([s.latents for s in chosen])
    sizes = [len(s.latents) for s in chosen]
    time = np.zeros(len(order)) if times is None else np.asarray(times, dtype=np.float64)[order]
    target = place.spread(np.concatenate([s.target for s in chosen]), IGNORE)
    noise = np.zeros_like(latents) if noises is None else np.concatenate([noises[i] for i in order])
    return Batch(
        tokens=place.spread(np.concatenate([s.tokens for s in chosen]), 0),
        kind=place.spread(np.concatenate([s.kind for s in chosen]), TEXT),
        position=place.spread(place.position, 0),
        segment=place.spread(place.segment, -1),
        span=place.spread(place.spans(np.concatenate([s.span for s in chosen])), -1),
        causal=place.spread(np.concatenate([s.causal for s in chosen]), False),
        target=target,
        task=place.spread(np.repeat([s.task for s in chosen], place.lengths), -1),
        vit_patches=torch.from_numpy(np.concatenate([s.vit_patches for s in chosen])),
        vit_grid=torch.from_numpy(np.concatenate([s.vit_grid for s in chosen])),
        latents=torch.from_numpy(latents),
        codes=torch.from_numpy(np.concatenate([s.codes for s in chosen])),
        latent_grid=torch.from_numpy(np.concatenate([s.latent_grid for s in chosen])),
        noise=torch.from_numpy(noise.astype(np.float32, copy=False)),
        time=torch.from_numpy(np.repeat(time, sizes).astype(np.float32)),
        ce_norm=torch.tensor(float(max(1, int((target != IGNORE).sum())) if ce_norm is None else ce_norm)),
        flow_norm=torch.tensor(float(max(1, len(latents)) if flow_norm is None else flow_norm)),
    )


class _Places:
    """Where the tokens of the packed samples stand in the flattened [B, T] rows."""

    def __init__(self, rows: list[list[int]], samples: Sequence[Sample], row_tokens: int) -> None:
        self.shape = (len(rows), row_tokens)
        self.lengths = np.array([len(samples[i]) for row in rows for i in row])
        images = np.array([_num_images(samples[i]) for row in rows for i in row])
        starts, segments, first_image = [], [], []
        number = 0
        for row_number, row in enumerate(rows):
            used = seen = 0
            for segment in range(len(row)):
                starts.append(row_number * row_tokens + used)
                segments.append(segment)
                first_image.append(seen)
                used += int(self.lengths[number])
                seen += int(images[number])
                number += 1
            if used > row_tokens:
                raise DataError(f"a row of {used} tokens does not fit data.row_tokens={row_tokens}")
        total = int(self.lengths.sum())
        self.position = np.arange(total) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        self.index = np.repeat(starts, self.lengths) + self.position
        self.segment = np.repeat(segments, self.lengths)
        self.first_image = np.repeat(first_image, self.lengths)

    def spread(self, values: Array, fill: int | bool) -> torch.Tensor:
        """[sum of lengths] -> [B, T], `fill` at padding."""
        out = np.full(self.shape[0] * self.shape[1], fill, dtype=values.dtype)
        out[self.index] = values
        return torch.from_numpy(out.reshape(self.shape))

    def spans(self, span: Array) -> Array:
        """Image numbers inside the samples -> image numbers inside the rows."""
        return np.where(span >= 0, span + self.first_image, -1)


def _num_images(sample: Sample) -> int:
    return int(sample.span.max(initial=-1)) + 1
