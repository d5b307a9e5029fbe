"""The embedded image tokenizer: our VQ autoencoder, trained once on a corpus's generation images and cached.

`<cache>/image_tokenizer/{key}.safetensors` and `.json`: its figures on images that it was not trained on, seconds,
and the sha256 of the weights. Both are written beside their target and renamed, the JSON last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.image_codes import corpus_fingerprint, generation_samples, same_size_batches
from symbiotic.data.packing import Array
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.files import digest, locked, read_json, source_hash, write_json
from symbiotic.images.store import load_image_tokenizer
from symbiotic.images.tokenizer import KEY, ImageTokenizer
from symbiotic.images.training import Recipe, measure, timed_training
from symbiotic.schema import ConfigError, RunError

CODE = (
    *("images/tokenizer.py", "images/quantiser.py", "images/autoencoder.py", "images/training.py"),
    *("data/image_vq.py", "data/image_codes.py"),
)
"""Sources that decide what the tokenizer becomes."""

LEAST = {"encoder_blocks": 0, "decoder_blocks": 0, "codebook_size": 2, "steps": 2}  # of all others: 1


class EmbeddedVQ:
    """Trains `VQAutoencoder` on the images of the corpus, less those held out to measure it.

    64 codes are enough for all that the judges see, and of codebooks of 64, 128 and 256 the one whose codes a caption
    says most about: two pictures of one caption have the same code at 88, 74 and 63 % of the places (600 steps), since
    larger ones also code the small random differences of colour.

    Args:
        codebook_size: number of codes. patch: pixels along a side of a code; that of the flow's latents.
        width, dim, encoder_blocks, decoder_blocks: see `VQAutoencoder`. steps, batch, lr, seed: of the training.
        held_out: share of the images that it is measured on instead.

    fingerprint: of the arguments and of the code; the key of its files has the corpus beside.

    Raises:
        ConfigError: a value that is out of range.
    """

    def __init__(
        self,
        codebook_size: int = 64,
        patch: int = 4,
        width: int = 64,
        dim: int = 8,
        encoder_blocks: int = 1,
        decoder_blocks: int = 2,
        steps: int = 800,
        batch: int = 64,
        lr: float = 3e-3,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.codebook_size, self.held_out = codebook_size, held_out
        self.arguments = {"codebook_size": codebook_size, "patch": patch, "width": width, "dim": dim}
        self.arguments |= {"encoder_blocks": encoder_blocks, "decoder_blocks": decoder_blocks}
        self.recipe = Recipe(steps=steps, batch=batch, lr=lr, seed=seed)
        _check_values({**self.arguments, "steps": steps, "batch": batch}, lr, held_out)
        parts = [self.arguments, vars(self.recipe), held_out, source_hash(*CODE), torch.__version__]
        self.fingerprint = digest(parts)  # now: sources may be edited while it trains

    def files(self, data: Path, cache: Path) -> tuple[Path, Path]:
        """Weights and figures of the tokenizer of this corpus."""
        key = digest([self.fingerprint, corpus_fingerprint(ShardIndex.load(data / "index.npz"))])
        weights = cache / "image_tokenizer" / f"{key}.safetensors"
        return weights, weights.with_suffix(".json")

    def prepare(self, data: Path, cache: Path) -> ImageTokenizer:
        """The tokenizer, from the cache or trained now; of several processes one trains, the others wait. Prints what
        it is worth.

        Args:
            data: a corpus folder with `index.npz` and `shards/`. cache: parent of `image_tokenizer/`.

        Raises:
            DataError: no corpus, fewer images than it takes, images of several sizes or of one that does not divide
                by the patch, or a cache that cannot be written.
        """
        weights, facts = self.files(data, cache)
        found = _load(weights, facts)
        if found is None:
            with readable_errors("write the image tokenizer", weights), locked(weights.with_suffix(".lock")):
                found = _load(weights, facts)
                if found is None:
                    self._train(data, weights, facts)
                    found = _load(weights, facts)
        if found is None:
            raise DataError(f"{weights}: written, but not readable")
        print(f"   {summary(read_json(facts))}", flush=True)
        return found

    def figures(self, data: Path, cache: Path) -> dict[str, Any]:
        """What stands in the JSON beside the prepared weights; empty where there are none."""
        return read_json(self.files(data, cache)[1]) or {}

    def split(self, index: ShardIndex) -> tuple[Array, Array]:
        """Sample numbers for training and for measuring: the same for the same seed."""
        samples = generation_samples(index)
        order = np.random.default_rng([self.recipe.seed, 11]).permutation(len(samples))
        cut = max(1, round(self.held_out * len(samples)))
        return np.sort(samples[order[cut:]]), np.sort(samples[order[:cut]])

    def _train(self, data: Path, weights: Path, facts: Path) -> None:
        index = ShardIndex.load(data / "index.npz")
        reader = ShardReader(data / "shards", index)
        train, held_out = (read_images(reader, samples) for samples in self.split(index))
        self._check(train, data)
        tokenizer, seconds = timed_training(train, self.recipe, **self.arguments)
        tokenizer.save(weights)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        made = {"sha256": sha256, "arguments": {**self.arguments, **vars(self.recipe)}, **seconds}
        write_json(facts, {**made, "held_out": measure(tokenizer, held_out)})

    def _check(self, pixels: Tensor, data: Path) -> None:
        patch, (_, height, width, _) = self.arguments["patch"], pixels.shape
        if height % patch or width % patch:
            raise DataError(f"{data}: images of {height}x{width} pixels do not divide by {KEY}.patch={patch}")
        patches = len(pixels) * (height // patch) * (width // patch)
        if patches < self.codebook_size:
            raise DataError(f"{data}: {patches} patches cannot fill {KEY}.codebook_size={self.codebook_size}")


def _check_values(counts: Mapping[str, int], lr: float, held_out: float) -> None:
    for name, value in counts.items():
        if value < LEAST.get(name, 1):
            raise ConfigError(f"{KEY}.{name}={value}: must be at least {LEAST.get(name, 1)}")
    if not 0 < held_out < 1:
        raise ConfigError(f"{KEY}.held_out={held_out}: must be above 0 and below 1")
    if not lr > 0:
        raise ConfigError(f"{KEY}.lr={lr}: must be above 0")


def summary(figures: Mapping[str, Any]) -> str:
    """One line: what the tokenizer is worth on images that it was not trained on."""
    row, size = figures["held_out"], figures["arguments"]["codebook_size"]
    return (
        f"{size} codes, {row['codes_used']:.0%} of them used, perplexity {row['perplexity']:.1f}; "
        f"{row['images']} held-out images: mse {row['mse']:.4f}, psnr {row['psnr']:.1f} dB"
    )


def read_images(reader: ShardReader, samples: Array) -> Tensor:
    """uint8 [n, H, W, 3].

    Raises:
        DataError: no images, or some of another size.
    """
    parts = [pixels for _, pixels in same_size_batches(reader, samples, len(samples))]
    if len(parts) != 1:
        what = "images of several sizes" if parts else "too few images that are generated"
        raise DataError(f"{reader.folder}: {what}; the embedded image tokenizer needs many of one size")
    return parts[0]


def _load(weights: Path, facts: Path) -> ImageTokenizer | None:
    """None where there is none, or where one of the two files is damaged: both are then written anew."""
    try:
        if hashlib.sha256(weights.read_bytes()).hexdigest() != (read_json(facts) or {}).get("sha256"):
            return None
        return load_image_tokenizer(weights)
    except (OSError, RunError):
        return None
