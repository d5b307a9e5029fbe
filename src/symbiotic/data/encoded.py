"""Vectors of images that an encoder made ahead of time: beside each shard one safetensors file, read sample by sample.

`<folder>/encoder.json` says what the vectors are; `<folder>/<shard>.safetensors` holds a tensor [h, w, P] under the key
of each sample that has one, and the size of its picture. Where a run reads them, they take the place of the pixel
patches of that kind, and the counts of the index follow. P numbers a token, h x w tokens an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symbiotic.convert.tensor_files import Shape, Stored, dtype_name, header, read, write_file
from symbiotic.data.bad import Refused
from symbiotic.data.errors import DataError
from symbiotic.data.formats import image_size, read_sizes
from symbiotic.data.packing import Array, Sample
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.files import read_json, write_json
from symbiotic.images.encoder import ImageEncoder
from symbiotic.images.tokenizer import to_pixels
from symbiotic.models.batch import IGNORE, VAE, VIT
from symbiotic.models.embeddings import unpatchify
from symbiotic.schema import TASKS, ConfigError, RunError

ABOUT = "encoder.json"
KEY = "data.encoded"
GET = "python src/encode_shards.py writes it"
PATCH = 4  # pixels along a side of the patches that the index counts
KINDS = {"vit": ("mmu",), "vae": ("t2i", "t2i_long")}
"""Kind of the vectors -> the tasks whose images they are."""


def wanted(index: ShardIndex, kind: str) -> Array:
    """Numbers of the samples whose image an encoder of this kind encodes, shard by shard."""
    tasks = [TASKS.index(task) for task in KINDS[kind]]
    return np.flatnonzero(np.isin(index.task, tasks) & (index.png[:, 1] > 0))


def write_about(folder: Path, encoder: ImageEncoder, dtype: str, config: Mapping[str, Any]) -> None:
    """config: how the encoder was made, for people.

    Raises:
        ConfigError: the folder holds vectors of another encoder.
    """
    about = {"kind": encoder.kind, "patch_dim": encoder.patch_dim, "fingerprint": encoder.fingerprint, "dtype": dtype}
    found = read_json(folder / ABOUT)
    if found is not None and {key: found.get(key) for key in about} != about:
        has = f"vectors of encoder {found.get('fingerprint')} as {found.get('dtype')}"
        raise ConfigError(f"out={folder}: holds {has}, not of {encoder.fingerprint} as {dtype}; must be another folder")
    write_json(folder / ABOUT, {**about, "encoder": dict(config)})


def file_of(folder: Path, shard: str) -> Path:
    return folder / f"{Path(shard).stem}.safetensors"


def encode_shard(
    encoder: ImageEncoder, reader: ShardReader, samples: Array, path: Path, dtype: torch.dtype, batch: int
) -> int:
    """Write the vectors of these samples, all of one shard; returns how many numbers they are.

    Raises:
        DataError: an image that cannot be read, or does not divide into tokens; the line names shard and key.
    """
    index, kept = reader.index, {}
    sizes: dict[str, tuple[int, int]] = {}
    for start in range(0, len(samples), batch):
        some = [int(sample) for sample in samples[start : start + batch]]
        pixels = [_pixels(reader, sample) for sample in some]
        for shape in dict.fromkeys(image.shape for image in pixels):
            chosen = [(s, image) for s, image in zip(some, pixels, strict=True) if image.shape == shape]
            made = _encoded(encoder, torch.from_numpy(np.stack([image for _, image in chosen])), index, chosen[0][0])
            for (sample, image), vectors in zip(chosen, made.to(dtype), strict=True):
                kept[index.keys[sample].decode()] = vectors.contiguous()
                sizes[index.keys[sample].decode()] = (image.shape[0], image.shape[1])
    about: dict[str, Shape] = {key: (dtype_name(kept[key]), tuple(kept[key].shape)) for key in sorted(kept)}
    write_file(path, about, ((key, kept[key]) for key in about), {"sizes": json.dumps(sizes)})
    return sum(tensor.numel() for tensor in kept.values())


def _pixels(reader: ShardReader, sample: int) -> Array:
    pixels = reader.read(sample)[1]
    assert pixels is not None  # `wanted` asks for those with an image
    return pixels


def _encoded(encoder: ImageEncoder, pixels: Tensor, index: ShardIndex, sample: int) -> Tensor:
    try:
        return encoder.encode(pixels.to(encoder.device)).cpu()
    except ValueError as error:
        raise DataError(f"{index.name(sample)}: {error}") from error


# --------------------------------------------------------------------------- in a run


@dataclass(frozen=True)
class Encoded:
    """The vectors of one encoder for the samples of an index."""

    folder: Path
    kind: str
    patch_dim: int
    fingerprint: str
    places: Mapping[int, Stored]  # by sample number

    @classmethod
    def open(cls, folder: str | Path, index: ShardIndex) -> Encoded:
        """
        Raises:
            ConfigError: no such folder. DataError: a sample without vectors, or a file that is damaged.
        """
        folder = Path(folder)
        about = read_json(folder / ABOUT)
        if not isinstance(about, dict) or about.get("kind") not in KINDS:
            raise ConfigError(f"{KEY}={folder}: no readable {ABOUT} in it; {GET}")
        places: dict[int, Stored] = {}
        samples = wanted(index, about["kind"])
        for shard in np.unique(index.shard[samples]):
            path = file_of(folder, str(index.shards[shard]))
            found = _header(path)
            for sample in samples[index.shard[samples] == shard]:
                key = index.keys[sample].decode()
                if key not in found or len(found[key].shape) != 3 or found[key].shape[2] != about["patch_dim"]:
                    raise DataError(f"{path}: no vectors of {index.name(int(sample))}; {GET} anew")
                places[int(sample)] = found[key]
        return cls(folder, about["kind"], about["patch_dim"], about["fingerprint"], places)

    def counts(self, index: ShardIndex, reader: ShardReader) -> ShardIndex:
        """The index with the lengths that the samples have with these vectors."""
        tokens, latents, dropped = index.num_tokens.copy(), index.num_latents.copy(), index.dropped_tokens.copy()
        for sample, at in self.places.items():
            now = at.shape[0] * at.shape[1]
            before = int(latents[sample]) if self.kind == "vae" else _read_patches(reader, sample)
            tokens[sample] += now - before
            dropped[sample] += now - before
            latents[sample] = now if self.kind == "vae" else latents[sample]
        return replace(index, num_tokens=tokens, num_latents=latents, dropped_tokens=dropped)

    def put(self, sample: Sample, number: int) -> Sample:
        """The sample with its vectors in the place of its pixel patches, if it has an image of this kind.

        Raises:
            DataError: its file ends too early.
        """
        if number not in self.places:  # no image: its empty arrays are as wide as those of the others
            empty = np.zeros((0, self.patch_dim), np.float32)
            return replace(sample, latents=empty) if self.kind == "vae" else replace(sample, vit_patches=empty)
        try:
            _, tensor = next(read([("", self.places[number])]))
        except RunError as error:
            raise DataError(str(error)) from error
        return with_vectors(sample, VAE if self.kind == "vae" else VIT, tensor.float().numpy())


@dataclass(frozen=True)
class Made:
    """The same of images that are read, made from the pixels when a sample is: for a vision tower inside the model."""

    encoder: ImageEncoder

    def counts(self, index: ShardIndex, reader: ShardReader) -> ShardIndex:
        """The index with the lengths that the samples have with these vectors."""
        tokens, dropped = index.num_tokens.copy(), index.dropped_tokens.copy()
        for sample in wanted(index, self.encoder.kind):
            h, w = self.encoder.grid(*image_size(reader.record(int(sample))))
            more = h * w - _read_patches(reader, int(sample))
            tokens[sample] += more
            dropped[sample] += more
        return replace(index, num_tokens=tokens, dropped_tokens=dropped)

    def extra(self, tokenizer: Tokenizer, record: Mapping[str, Any]) -> int:
        """Tokens of a record beyond those of `formats.measure`.

        Raises:
            Refused: several images are read in it.
        """
        sizes = read_sizes(record, tokenizer)
        if not sizes:
            return 0
        if len(sizes) > 1:
            raise Refused("several_images", f"{len(sizes)} images are read; a vision tower takes one a sample")
        (height, width), (h, w) = sizes[0], self.encoder.grid(*sizes[0])
        return h * w - (height // PATCH) * (width // PATCH)

    def put(self, sample: Sample, number: int) -> Sample:
        """The sample with its vectors in the place of its pixel patches, if it has an image of this kind."""
        return read_with(self.encoder, [sample])[0]


def _header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {GET}")
    try:
        return header(path)
    except RunError as error:
        raise DataError(f"{error}; {GET} anew") from error


def _read_patches(reader: ShardReader, sample: int) -> int:
    height, width = image_size(reader.record(sample))
    return (height // PATCH) * (width // PATCH)


def read_with(encoder: ImageEncoder, samples: Sequence[Sample]) -> list[Sample]:
    """Samples of pixel patches with the vectors of an encoder of images that are read in their place."""
    return [_read_with(encoder, sample) for sample in samples]


def _read_with(encoder: ImageEncoder, sample: Sample) -> Sample:
    if not len(sample.vit_patches):  # its empty patches are as wide as those of others
        return replace(sample, vit_patches=np.zeros((0, encoder.patch_dim), np.float32))
    h, w = (int(side) + 1 for side in sample.vit_grid.max(0))
    pixels = to_pixels(unpatchify(torch.from_numpy(sample.vit_patches)[None], h, w, PATCH).permute(0, 3, 1, 2))
    return with_vectors(sample, VIT, encoder.encode(pixels.to(encoder.device))[0].cpu().numpy())


def with_vectors(sample: Sample, kind: int, vectors_hwP: Array) -> Sample:
    """The sample, whose one image of this kind becomes h x w tokens.

    Raises:
        DataError: it has no image of this kind, or several.
    """
    h, w, size = vectors_hwP.shape
    places = np.flatnonzero(sample.kind == kind)
    spans = np.unique(sample.span[places])
    if len(spans) != 1:
        raise DataError(f"sample {sample.key}: {len(spans)} images of this kind; must be one")
    first, last = int(places[0]), int(places[-1])

    def laid(values: Array, fill: Any) -> Array:
        return np.concatenate([values[:first], np.full(h * w, fill, values.dtype), values[last + 1 :]])

    grid = np.stack([np.arange(h).repeat(w), np.tile(np.arange(w), h)], axis=1)
    flat = np.ascontiguousarray(vectors_hwP.reshape(h * w, size), dtype=np.float32)
    patches: dict[str, Any] = {"vit_patches": flat, "vit_grid": grid}
    if kind == VAE:
        patches = {"latents": flat, "latent_grid": grid}
    return replace(
        sample,
        tokens=laid(sample.tokens, 0),
        kind=laid(sample.kind, kind),
        span=laid(sample.span, spans[0]),
        causal=laid(sample.causal, False),
        target=laid(sample.target, IGNORE),
        **patches,
    )
