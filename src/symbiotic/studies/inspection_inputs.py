"""What the router inspector starts from: the files of a run, and the sequence that its model is run on.

The sequence is that of training and evaluation (`data/formats.py`), one sample in one row, so there is no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from symbiotic.data.formats import question_parts, reading_parts
from symbiotic.data.packing import Array, Sample, Text, build_sample
from symbiotic.data.tokenizer import EOS, Tokenizer
from symbiotic.evaluation.benchmark import measuring
from symbiotic.evaluation.captions import read_captions
from symbiotic.evaluation.prompts import caption_samples, one_a_row, pictures
from symbiotic.generation.images import start_noise
from symbiotic.models.batch import VAE, VIT, Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS, Config

if TYPE_CHECKING:
    from symbiotic.studies.inspection import Request


@dataclass(frozen=True)
class Token:
    """grid: row and column of a patch in its image; None for words."""

    place: int
    word: str
    kind: str
    grid: tuple[int, int] | None


# --------------------------------------------------------------------------- the sequence


def reading_sample(prompt: str, pixels: Array | None, tokenizer: Tokenizer, answer: list[int] | None = None) -> Sample:
    """answer: ids of its words, to be put behind the prompt with `<eos>`, as targets."""
    parts = question_parts(prompt, tokenizer) if pixels is None else reading_parts(pixels, prompt, tokenizer)
    if answer is not None:
        parts.append(Text([*answer, EOS], loss=True))
    return build_sample("prompt", "lm" if pixels is None else "mmu", parts)


def generation_batch(request: Request, pixels: Array, tokenizer: Tokenizer) -> Batch:
    """The caption and the image `pixels`, clean; for the flow with the noise of `seed` and the flow time `time`."""
    samples = caption_samples([request.prompt], pixels.shape[:2], tokenizer, pixels[None])
    noise = start_noise(request.seed, [0], *samples[0].latents.shape)
    return one_a_row(samples, [request.time], list(noise.numpy()))


def drawn(model: UnifiedModel, request: Request, config: Config, corpus: Path, tokenizer: Tokenizer) -> Array:
    """The image that the model draws from the prompt, in the size of the corpus's images."""
    _, images = read_captions(corpus / "benchmarks" / "generation", 1, [])
    size = (images.shape[1], images.shape[2])
    with measuring(model):
        made = pictures(model, [request.prompt], tokenizer, config.objective, size=size, seed=request.seed)
    return made[0].numpy()


def tokens_of(batch: Batch, tokenizer: Tokenizer) -> list[Token]:
    grids = {VIT: iter(batch.vit_grid.tolist()), VAE: iter(batch.latent_grid.tolist())}
    found = []
    for place, (kind, number) in enumerate(zip(batch.kind[0].tolist(), batch.tokens[0].tolist(), strict=True)):
        if kind in grids:
            row, column = next(grids[kind])
            found.append(Token(place, f"patch {row},{column}", KINDS[kind], (row, column)))
        else:
            found.append(Token(place, str(tokenizer.inner.id_to_token(number)), KINDS[kind], None))
    return found
