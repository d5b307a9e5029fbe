"""Generation on the embedded corpus: pictures from captions, judged; and the error of the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.evaluation.assets import versions
from symbiotic.evaluation.benchmark import Benchmark, Record, Value, device_of, mean
from symbiotic.evaluation.captions import ATTRIBUTES, Caption, read_captions
from symbiotic.evaluation.context import Context, Gallery
from symbiotic.evaluation.frechet import frechet_value
from symbiotic.evaluation.prompts import caption_samples, one_a_row
from symbiotic.evaluation.scorers import Judges, Scorers
from symbiotic.generation.images import start_noise
from symbiotic.objectives.autoregressive import shifted
from symbiotic.objectives.flow import data_from, noised

NAMES = ("embedded_acc", "embedded_acc_held_out", "embedded_clip", "embedded_fd")
FLOW_TIMES = (0.3, 0.5, 0.7, 0.9)
FLOW_SEED = 20_000  # the flow error's noise: the same for every model, seed and step


class Pictures(Benchmark):
    """Images generated from the captions, judged by the classifier and the small CLIP model."""

    name = "generation"
    needs_latents = True

    def __init__(self, folder: Path, images: int, judges: Judges) -> None:
        self.folder, self.images, self.judges = folder, images, judges

    def prepare(self, say: Callable[[str], None]) -> None:
        self.judges.load(say)

    def protocol(self) -> dict[str, object]:
        return {"images": self.images, "judges": self.judges.key(), **versions("open_clip_torch")}

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        captions, pixels = read_captions(self.folder, self.images, context.problems)
        if not captions:
            yield from ((name, mean([])) for name in NAMES)
            return
        captions, real = list(context.chosen(captions)), torch.from_numpy(np.stack(context.chosen(list(pixels))))
        numbers, texts = [c.number for c in captions], [c.caption for c in captions]
        gallery, judge = context.gallery(model, "embedded", texts, numbers, size=pixels.shape[1:3]), self.judges.load()
        numbered = list(enumerate(captions))
        records = context.measured(self.name, numbered, lambda some: judgements(judge, gallery, some))
        yield "embedded_acc", mean([r["correct"] for r in records])
        yield "embedded_acc_held_out", mean([r["correct"] for r in records if r["held_out"]])
        yield "embedded_clip", mean([r["cosine"] for r in records])
        made = torch.from_numpy(gallery[:])
        yield "embedded_fd", frechet_value(judge.features(made), judge.features(real))


def judgements(judge: Scorers, gallery: Gallery, some: Sequence[tuple[int, Caption]]) -> list[Record]:
    """What the classifier sees in each picture, and the cosine of picture and caption."""
    made = torch.from_numpy(np.stack([gallery[i] for i, _ in some]))
    seen, cosines = judge.attributes(made), judge.cosines(made, [c.caption for _, c in some])
    return [
        {
            "id": caption.id,
            "caption": caption.caption,
            "held_out": caption.held_out,
            "seen": dict(zip(ATTRIBUTES, values, strict=True)),
            "correct": values == caption.attributes,
            "cosine": round(cosine, 6),
        }
        for (_, caption), values, cosine in zip(some, seen, cosines, strict=True)
    ]


class FlowError(Benchmark):
    """Mean squared error of the predicted clean latents, on the captions' reference images, at fixed flow times and
    noise."""

    name = "flow_error"
    needs_latents = True

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images

    def protocol(self) -> dict[str, object]:
        return {"images": self.images, "times": list(FLOW_TIMES), "noise": FLOW_SEED}

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        captions, pixels = read_captions(self.folder, self.images, context.problems)
        numbered = context.chosen(list(enumerate(captions)))

        def measure(some: Sequence[tuple[int, Caption]]) -> list[Record]:
            shown = [caption for _, caption in some]
            images = pixels[[i for i, _ in some]]
            made = torch.stack([flow_errors(model, shown, images, time, context) for time in FLOW_TIMES]).mean(0)
            return [{"id": c.id, "error": error} for c, error in zip(shown, made.tolist(), strict=True)]

        yield self.name, mean([record["error"] for record in context.measured(self.name, numbered, measure)])


class ImageCE(Benchmark):
    """Cross-entropy (nats a code) of the codes of the captions' reference images, each given those before it."""

    name = "image_ce"
    needs_latents = True

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images

    def protocol(self) -> dict[str, object]:
        return {"images": self.images}

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        captions, pixels = read_captions(self.folder, self.images, context.problems)
        numbered = context.chosen(list(enumerate(captions)))

        def measure(some: Sequence[tuple[int, Caption]]) -> list[Record]:
            shown = [caption for _, caption in some]
            found = image_ces(model, shown, pixels[[i for i, _ in some]], context)
            return [{"id": c.id, "image_ce": nats} for c, nats in zip(shown, found.tolist(), strict=True)]

        yield self.name, mean([record["image_ce"] for record in context.measured(self.name, numbered, measure)])


ERROR_OF: dict[str, Callable[[Path, int], Benchmark]] = {"flow": FlowError, "autoregressive": ImageCE}
"""Objective -> how far off its predictions are, on reference images."""


def image_ces(model: nn.Module, captions: Sequence[Caption], pixels: np.ndarray, context: Context) -> Tensor:
    """[n] mean cross-entropy of each image's codes."""
    samples = caption_samples([c.caption for c in captions], pixels.shape[1:3], context.tokenizer, pixels)
    clean = one_a_row(samples).to(device_of(model))
    nothing = torch.zeros_like(clean.target, dtype=torch.bool)
    logits = model(shifted(clean), logits_at=nothing).prediction.float()
    nats = torch.nn.functional.cross_entropy(logits, clean.codes, reduction="none")
    return nats.view(len(samples), -1).mean(1).cpu()


def flow_errors(
    model: nn.Module, captions: Sequence[Caption], pixels: np.ndarray, time: float, context: Context
) -> Tensor:
    """[n] mean squared error of each image at one flow time."""
    texts, size = [c.caption for c in captions], (pixels.shape[1], pixels.shape[2])
    samples = caption_samples(texts, size, context.tokenizer, pixels)
    noise = start_noise(FLOW_SEED, [c.number for c in captions], *samples[0].latents.shape)
    clean = one_a_row(samples, [time] * len(samples), list(noise.numpy())).to(device_of(model))
    batch = noised(clean)
    nothing = torch.zeros_like(batch.target, dtype=torch.bool)
    prediction = model(batch, logits_at=nothing).prediction.float()
    data = data_from(prediction, batch.latents, batch.time, context.objective.prediction)
    return (data - clean.latents).square().mean(-1).view(len(samples), -1).mean(1).cpu()
