"""The codes of a corpus's generation images: encoded once by an image tokenizer, kept in a file.

A sample generates an image where the index gives it latents. All its codes are one flat array with offsets, since
images may differ in size.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.packing import Array
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.files import commit, locked
from symbiotic.images.tokenizer import ImageTokenizer


def generation_samples(index: ShardIndex) -> Array:
    """Numbers of the samples that generate an image, in the order of the index."""
    return np.flatnonzero(index.num_latents > 0)


def corpus_fingerprint(index: ShardIndex) -> str:
    """12 hexadecimal digits of the generation images: their sample numbers, sizes and checksums."""
    chosen = generation_samples(index)
    parts = (chosen, index.png[chosen], np.array(len(index)))
    return hashlib.sha256(b"".join(part.astype(np.int64).tobytes() for part in parts)).hexdigest()[:12]


@dataclass(frozen=True)
class ImageCodes:
    """Codes by sample number of the index; empty for samples that generate no image."""

    flat: Array  # [sum of l] uint8, uint16 or int32: the codes of all samples, one after the other
    offsets: Array  # [n + 1] int64: sample i has flat[offsets[i] : offsets[i + 1]]
    codebook_size: Array  # []
    patch: Array  # []

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> Array:
        """[l] int64, row-major."""
        return self.flat[self.offsets[sample] : self.offsets[sample + 1]].astype(np.int64)

    def save(self, path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> ImageCodes | None:
        """None where there is no such file, or where it is damaged (its own CRCs tell)."""
        try:
            with path.open("rb") as stream:
                stored = np.load(stream, allow_pickle=False)
                return cls(**{field.name: stored[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError):
            return None


def encode_corpus(
    tokenizer: ImageTokenizer, folder: Path, index: ShardIndex, cache: Path, batch: int = 256
) -> ImageCodes:
    """The codes of all generation images, from the cache or encoded now; of several processes one encodes.

    Args:
        folder: where the shards lie. cache: parent of `image_codes/`. batch: images in memory at a time.

    Raises:
        DataError: an image that cannot be read or does not divide into codes, or a cache that cannot be written.
    """
    path = cache / "image_codes" / f"{tokenizer.fingerprint}-{corpus_fingerprint(index)}.npz"
    found = ImageCodes.load(path)
    if found is None:
        with readable_errors("write image codes", path), locked(path.with_suffix(".lock")):
            found = ImageCodes.load(path)
            if found is None:
                found = _encode(tokenizer, ShardReader(folder, index), batch)
                commit(path, found.save)
    return found


def _encode(tokenizer: ImageTokenizer, reader: ShardReader, batch: int) -> ImageCodes:
    index, size = reader.index, tokenizer.codebook_size
    kind = next(kind for kind in (np.uint8, np.uint16, np.int32) if size - 1 <= np.iinfo(kind).max)
    lengths, parts = np.zeros(len(index), dtype=np.int64), [np.zeros(0, kind)]
    device = next(tokenizer.buffers(), torch.zeros(0)).device
    for samples, pixels in same_size_batches(reader, generation_samples(index), batch):
        try:
            codes = tokenizer.encode(pixels.to(device)).cpu().numpy()
        except ValueError as error:
            raise DataError(f"{index.name(int(samples[0]))}: {error}") from error
        lengths[samples] = codes.shape[1]
        parts.append(codes.astype(kind).reshape(-1))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return ImageCodes(np.concatenate(parts), offsets, np.array(size), np.array(tokenizer.patch))


def same_size_batches(reader: ShardReader, samples: Array, batch: int) -> Iterator[tuple[Array, torch.Tensor]]:
    """Up to `batch` neighbours of one size: their numbers [b] and pixels uint8 [b, H, W, 3]."""
    numbers: list[int] = []
    images: list[Array] = []
    for sample in samples:
        _, pixels = reader.read(int(sample))
        if pixels is None:
            raise DataError(f"{reader.index.name(int(sample))}: a sample that generates an image needs one")
        if images and (len(images) == batch or pixels.shape != images[0].shape):
            yield np.array(numbers), torch.from_numpy(np.stack(images))
            numbers, images = [], []
        numbers.append(int(sample))
        images.append(pixels)
    if images:
        yield np.array(numbers), torch.from_numpy(np.stack(images))
