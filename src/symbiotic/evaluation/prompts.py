"""From questions and captions to batches for decoding and sampling, and to answers and pictures.

The sequences are those of training (`data/formats.py`), one sample a row. The sample grid of a run, `embedded.py`
and every other user of a trained model come through here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.data.encoded import read_with, with_vectors
from symbiotic.data.formats import generation_parts
from symbiotic.data.packing import Sample, before_image, build_sample, collate, with_codes
from symbiotic.data.tokenizer import EOS, Tokenizer
from symbiotic.evaluation.benchmark import device_of
from symbiotic.generation.codes import sample_codes, start_draws
from symbiotic.generation.images import needs_unguided, sample_latents, start_noise, to_pixels
from symbiotic.generation.text import greedy, last_logits
from symbiotic.models.batch import VAE, Batch
from symbiotic.schema import Objective

MASK_PLACES = 2**25
"""Rows times squared width of a forward, at most: its attention mask takes so many bytes, its scores several times."""
MAX_TOKENS = 4096
"""Of an item, where nothing else is said. Rotary positions know no last one, so memory is the limit: two rows of this
width, as an image with guidance takes, are MASK_PLACES. Five shots of any subject of MMLU are shorter."""


def one_a_row(
    samples: Sequence[Sample], times: Sequence[float] | None = None, noises: Sequence[np.ndarray] | None = None
) -> Batch:
    """A batch with one sample a row, padded on the right to the longest."""
    width = max(len(sample) for sample in samples)
    return collate(samples, width, times=times, noises=noises, rows=[[i] for i in range(len(samples))])


def answers(
    model: nn.Module, samples: Sequence[Sample], tokenizer: Tokenizer, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedily decoded answers to prompts (samples without their answer), words joined by spaces.

    batch_size: rows of a forward, at most; see `by_length`.
    """
    samples = samples if tokenizer.vision is None else read_with(tokenizer.vision, samples)
    decoded = [""] * len(samples)
    for places in by_length([len(sample) + max_new_tokens for sample in samples], batch_size):
        batch = one_a_row([samples[i] for i in places]).to(device_of(model))
        for i, tokens in zip(places, greedy(model, batch, EOS, max_new_tokens), strict=True):
            decoded[i] = tokenizer.decode(tokens)
    return decoded


def by_length(lengths: Sequence[int], batch_size: int, rows: int = 1) -> Iterator[list[int]]:
    """Numbers of samples, short ones first, in batches that the memory of attention allows: a long one pads no other.

    rows: of a forward that each sample takes.
    """
    some: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if some and (len(some) == batch_size or (len(some) + 1) * rows * lengths[i] ** 2 > MASK_PLACES):
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def letter_log_probs(model: nn.Module, samples: Sequence[Sample], tokenizer: Tokenizer) -> Tensor:
    """[n, 4] log-probabilities of the four answer letters behind each prompt, among these four; on the CPU."""
    batch = one_a_row(samples).to(device_of(model))
    letters = torch.tensor(tokenizer.letters, device=batch.tokens.device)
    return last_logits(model, batch)[:, letters].log_softmax(-1).cpu()


def caption_samples(
    captions: Sequence[str | None], size: tuple[int, int], tokenizer: Tokenizer, pixels: np.ndarray | None = None
) -> list[Sample]:
    """A sample per caption (None: without caption) for an image of `size` (height, width) pixels.

    pixels: uint8 [n, H, W, 3], where the latents (patches or codes) are to be those of an image.
    """
    empty = np.zeros((*size, 3), np.uint8)
    images = [empty] * len(captions) if pixels is None else list(pixels)
    parts = [generation_parts(i, c, tokenizer) for i, c in zip(images, captions, strict=True)]
    samples = [build_sample(str(c), "t2i", part) for c, part in zip(captions, parts, strict=True)]
    if tokenizer.autoencoder is not None:
        return [with_vectors(s, VAE, v) for s, v in zip(samples, _latents(tokenizer.autoencoder, images), strict=True)]
    if tokenizer.images is None:
        return samples
    if pixels is None:
        return [with_codes(sample, np.zeros(len(sample.latents))) for sample in samples]
    codes = tokenizer.images.encode(torch.from_numpy(np.stack(images))).cpu().numpy()
    return [with_codes(sample, own) for sample, own in zip(samples, codes, strict=True)]


def _latents(autoencoder: Any, images: Sequence[np.ndarray]) -> np.ndarray:
    """[n, h, w, P] of pictures of one size; zeros, which are only places, where they are black all over."""
    h, w = autoencoder.grid(*images[0].shape[:2])
    if not any(image.any() for image in images):
        return np.zeros((len(images), h, w, autoencoder.patch_dim), np.float32)
    return np.asarray(autoencoder.encode(torch.from_numpy(np.stack(images))).cpu().numpy())


def pictures(
    model: nn.Module,
    captions: Sequence[str],
    tokenizer: Tokenizer,
    objective: Objective,
    *,
    size: tuple[int, int] = (20, 20),
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 96,
) -> Tensor:
    """Generate one image per caption: uint8 [n, H, W, 3] on the CPU.

    The chance in an image (noise, or draws) depends on (seed, its number) alone. Beside its caption, the batch that it
    is drawn in decides how sums are rounded, so that in another batch a pixel may differ by one level. The caller holds
    the model in evaluation mode (`benchmark.measuring`).

    Args:
        tokenizer: with that of the images, where the objective is autoregressive.
        numbers: what the chance in each image is drawn from; default 0, 1, 2, ...
        batch_size: images at a time, at most; with guidance, each takes two rows. See `by_length`.
    """
    guided, numbers = needs_unguided(objective.sampler.guidance), numbers or range(len(captions))
    samples, free = caption_samples(captions, size, tokenizer), caption_samples([None], size, tokenizer)
    images = torch.zeros(len(captions), *size, 3, dtype=torch.uint8)
    for places in by_length([len(sample) for sample in samples], batch_size, 1 + guided):
        rows = [samples[i] for i in places] + free * (len(places) if guided else 0)
        chances = [numbers[i] for i in places]
        images[places] = drawn(model, rows, chances, tokenizer, objective, size=size, seed=seed)
    return images


def drawn(
    model: nn.Module,
    rows: Sequence[Sample],
    numbers: Sequence[int],
    tokenizer: Tokenizer,
    objective: Objective,
    *,
    size: tuple[int, int],
    seed: int,
) -> Tensor:
    """uint8 [n, H, W, 3]: one batch of `pictures`. rows: the captions, then those without as far as guidance needs."""
    device, latents = device_of(model), rows[0].latents.shape
    if objective.name == "flow":
        noise, batch = start_noise(seed, numbers, *latents), one_a_row(rows)
        made = sample_latents(model, batch.to(device), noise, objective.sampler, objective.prediction)
        return to_pixels(made, *size) if tokenizer.autoencoder is None else tokenizer.autoencoder.decode(made, *size)
    assert tokenizer.images is not None
    draws, batch = start_draws(seed, numbers, latents[0]), one_a_row([before_image(row) for row in rows])
    grid = torch.from_numpy(rows[0].latent_grid)
    codes = sample_codes(model, batch.to(device), grid, draws, objective.sampler)
    return tokenizer.images.decode(codes, *size).cpu()
