"""Generation on the embedded corpus: pictures from captions, judged; and the error of the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Benchmark, Context, Record, Value, batches, device_of, mean
from symbiotic.evaluation.captions import ATTRIBUTES, Caption, read_captions
from symbiotic.evaluation.frechet import fit, frechet_distance
from symbiotic.evaluation.prompts import caption_samples, one_a_row, pictures
from symbiotic.evaluation.scorers import Scorers
from symbiotic.generation.images import start_noise
from symbiotic.objectives.flow import data_from, noised
from symbiotic.schema import Objective

NAMES = ("embedded_acc", "embedded_acc_held_out", "embedded_clip", "embedded_fd")
FLOW_TIMES = (0.3, 0.5, 0.7, 0.9)
FLOW_SEED = 20_000  # the flow error's noise: the same for every model, seed and step


class Pictures(Benchmark):
    """Images generated from the captions, judged by the classifier and the small CLIP model."""

    name = "generation"
    needs_latents = True

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, images: int, objective: Objective, judge: Callable[[], Scorers]
    ) -> None:
        self.folder, self.tokenizer, self.images = folder, tokenizer, images
        self.objective, self.judge = objective, judge

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        captions, pixels = read_captions(self.folder, self.images, context.problems)
        if not captions:
            yield from ((name, mean([])) for name in NAMES)
            return
        texts = [c.caption for c in captions]
        made = pictures(
            model,
            texts,
            self.tokenizer,
            self.objective,
            size=(pixels.shape[1], pixels.shape[2]),
            seed=context.seed,
            numbers=[c.number for c in captions],
            batch_size=context.batch_size,
        )
        judge = self.judge()
        seen, cosines = judge.attributes(made), judge.cosines(made, texts)
        right = [s == c.attributes for s, c in zip(seen, captions, strict=True)]
        yield "embedded_acc", mean(right)
        yield "embedded_acc_held_out", mean([r for r, c in zip(right, captions, strict=True) if c.held_out])
        yield "embedded_clip", mean(cosines)
        yield "embedded_fd", self.distance(judge, made, torch.from_numpy(pixels))
        for caption, values, cosine in zip(captions, seen, cosines, strict=True):
            context.records.append(self.record(caption, values, cosine))

    def distance(self, judge: Scorers, made: Tensor, real: Tensor) -> Value:
        """Frechet distance of the classifier's features to those of the captions' reference images: 0 is perfect."""
        if len(made) < 2:
            return Value(float("nan"), len(made))
        return Value(frechet_distance(fit(judge.features(made)), fit(judge.features(real))), len(made))

    def record(self, caption: Caption, values: tuple[Any, ...], cosine: float) -> Record:
        given = {"id": caption.id, "caption": caption.caption, "held_out": caption.held_out}
        judged = {"seen": dict(zip(ATTRIBUTES, values, strict=True)), "correct": values == caption.attributes}
        return {"benchmark": self.name, **given, **judged, "cosine": round(cosine, 4)}


class FlowError(Benchmark):
    """Mean squared error of the predicted clean latents, on the captions' reference images, at fixed flow times and
    with fixed noise: the same number for an `x` and a `velocity` model that predict the same flow."""

    name = "flow_error"
    needs_latents = True

    def __init__(self, folder: Path, tokenizer: Tokenizer, images: int, prediction: str) -> None:
        self.folder, self.tokenizer, self.images, self.prediction = folder, tokenizer, images, prediction

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        captions, pixels = read_captions(self.folder, self.images, context.problems)
        errors: list[float] = []
        for some in batches(range(len(captions)), context.batch_size):
            made = [self.errors(model, [captions[i] for i in some], pixels[some], time) for time in FLOW_TIMES]
            errors += torch.stack(made).mean(0).tolist()
        for caption, error in zip(captions, errors, strict=True):
            context.records.append({"benchmark": self.name, "id": caption.id, "error": error})
        yield self.name, mean(errors)

    def errors(self, model: nn.Module, captions: Sequence[Caption], pixels: np.ndarray, time: float) -> Tensor:
        """[n] mean squared error of each image at one flow time."""
        samples = caption_samples(
            [c.caption for c in captions], (pixels.shape[1], pixels.shape[2]), self.tokenizer, pixels
        )
        noise = start_noise(FLOW_SEED, [c.number for c in captions], *samples[0].latents.shape)
        clean = one_a_row(samples, [time] * len(samples), list(noise.numpy())).to(device_of(model))
        batch = noised(clean)
        nothing = torch.zeros_like(batch.target, dtype=torch.bool)
        prediction = model(batch, logits_at=nothing).prediction.float()
        data = data_from(prediction, batch.latents, batch.time, self.prediction)
        return (data - clean.latents).square().mean(-1).view(len(samples), -1).mean(1).cpu()
