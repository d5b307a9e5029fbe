"""Training of the scorers on pictures that are rendered on the spot.

The pictures are blurred, noised and recoloured a little, so that a slightly imperfect generated picture is judged by
what it shows. All random draws come from generators of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symbiotic.data.embedded import Attributes, all_attributes, render_generation
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.scorer_networks import VALUES, Classifier, build_clip, clip_text, to_input


@dataclass(frozen=True)
class Preset:
    """How much the scorers train. Part of the key under which they are cached."""

    rounds: int  # training pictures of each of the 960 combinations
    classifier_steps: int
    clip_steps: int
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0


class Corpus(NamedTuple):
    """Rendered pictures, `rounds` times all combinations."""

    images: Tensor  # [rounds, 960, H, W, 3] uint8
    labels: Tensor  # [960, 4] numbers of the attributes' values
    attributes: list[Attributes]


def render_corpus(rounds: int, seed: int) -> Corpus:
    """Fresh pictures; another seed gives other pictures."""
    rng = np.random.default_rng([seed, 77])
    attributes = all_attributes()
    images = np.stack([np.stack([render_generation(a, rng) for a in attributes]) for _ in range(rounds)])
    labels = [[VALUES[i].index(v) for i, v in enumerate(a.record().values())] for a in attributes]
    return Corpus(torch.from_numpy(images), torch.tensor(labels), attributes)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [n, 3, H, W] in [-1, 1], each with its own mild blur, noise, and change of colours."""
    n = len(x)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = torch.lerp(x, blurred, draw(-0.5, 0.8, 1, 1, 1).clamp(min=0))
    x = x * draw(0.85, 1.1, 1, 1, 1) + draw(-0.08, 0.08, 3, 1, 1)
    x = x + draw(-0.1, 0.25, 1, 1, 1).clamp(min=0) * torch.randn(x.shape, generator=generator)
    return x.clamp(-1, 1)


def minibatches(corpus: Corpus, preset: Preset, steps: int, salt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented pictures [b, 3, H, W] and the numbers [b] of their combinations, all different in a batch."""
    rng = np.random.default_rng([preset.seed, salt])
    generator = torch.Generator().manual_seed(preset.seed * 1000 + salt)
    rounds, combinations = corpus.images.shape[:2]
    for _ in range(steps):
        chosen = torch.from_numpy(rng.permutation(combinations)[: preset.batch])
        version = torch.from_numpy(rng.integers(rounds, size=len(chosen)))
        yield augment(to_input(corpus.images[version, chosen]), generator), chosen


def _optimise(
    net: nn.Module, preset: Preset, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=preset.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.lr, total_steps=max(2, steps), pct_start=0.1)
    return optimizer, schedule


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


def train_classifier(corpus: Corpus, preset: Preset) -> Classifier:
    net = Classifier()
    optimizer, schedule = _optimise(net, preset, preset.classifier_steps)
    for images, chosen in minibatches(corpus, preset, preset.classifier_steps, salt=1):
        labels = corpus.labels[chosen]
        losses = [F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(net(images))]
        _step(torch.stack(losses).sum(), optimizer, schedule)
    return net.eval()


def train_clip(corpus: Corpus, preset: Preset, tokenizer: Tokenizer) -> Any:
    """Contrastive training (CLIP, arXiv 2103.00020) on short and long captions in turns."""
    net = build_clip(tokenizer.vocab_size)
    texts = [
        clip_text([a.short_caption for a in corpus.attributes], tokenizer),
        clip_text([a.long_caption for a in corpus.attributes], tokenizer),
    ]
    optimizer, schedule = _optimise(net, preset, preset.clip_steps)
    pairs = torch.arange(preset.batch)
    for step, (images, chosen) in enumerate(minibatches(corpus, preset, preset.clip_steps, salt=2)):
        image, text, scale = net(images, texts[step % 2][chosen])
        logits = scale * image @ text.T
        _step(F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs), optimizer, schedule)
        with torch.no_grad():
            net.logit_scale.clamp_(max=np.log(100))
    return net.eval()


@torch.no_grad()
def own_accuracy(classifier: Classifier, clip: Any, tokenizer: Tokenizer, preset: Preset) -> dict[str, float]:
    """Scores of the scorers on fresh renderings of all combinations: clean, and augmented as in training."""
    corpus = render_corpus(1, preset.seed + 10_000)
    clean = to_input(corpus.images[0])
    rough = augment(clean, torch.Generator().manual_seed(preset.seed + 1))
    found = {}
    for name, x in (("classifier", clean), ("classifier_augmented", rough)):
        right = torch.stack([h.argmax(-1) for h in classifier(x)], 1) == corpus.labels
        found[name] = right.all(1).float().mean().item()
    texts = clip_text([a.short_caption for a in corpus.attributes], tokenizer)
    cosines = clip.encode_image(clean, normalize=True) @ clip.encode_text(texts, normalize=True).T
    numbers = torch.arange(len(cosines))
    found["clip_retrieval"] = (cosines.argmax(1) == numbers).float().mean().item()
    found["clip_cosine_right"] = cosines.diagonal().mean().item()
    found["clip_cosine_wrong"] = cosines[numbers, numbers.roll(7)].mean().item()
    return found


def train(preset: Preset, tokenizer: Tokenizer) -> tuple[Classifier, Any, dict[str, float]]:
    """Both scorers and their own scores. The global random state is as before afterwards."""
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(preset.seed)
        corpus = render_corpus(preset.rounds, preset.seed)
        classifier = train_classifier(corpus, preset)
        clip = train_clip(corpus, preset, tokenizer)
        found = own_accuracy(classifier, clip, tokenizer, preset)
    found["seconds"] = time.monotonic() - started
    return classifier, clip, found
