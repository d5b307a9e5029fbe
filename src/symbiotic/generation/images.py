"""Image sampling: Euler steps along the flow from noise (t = 1) to data (t = 0), through the training forward.

Shapes: n images, l latents an image, P numbers a latent patch, H x W pixels.
The direction and the formulas of the flow stand in `objectives/flow.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.generation.text import prompt_lengths
from symbiotic.models.batch import TEXT, Batch
from symbiotic.models.cache import KVCache
from symbiotic.models.embeddings import unpatchify
from symbiotic.objectives.flow import shift_time, velocity_from
from symbiotic.schema import Sampler


def euler_times(steps: int, shift: float) -> list[float]:
    """`steps + 1` flow times from 1 (noise) to 0 (data); `shift` as in `objectives.flow.shift_time`.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"sampler: steps={steps} must be at least 1 and time_shift={shift:g} above 0")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def start_noise(seed: int, indices: Sequence[int], latents: int, patch_dim: int) -> Tensor:
    """[n, l, P] standard normal; each image's noise is a function of (seed, index) alone, whatever the batch."""
    draws = [np.random.default_rng([seed, i]).standard_normal((latents, patch_dim), np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))


def needs_unguided(guidance: float) -> bool:
    """Whether the rows without caption are needed at all: not at guidance 1."""
    return guidance != 1.0


@torch.no_grad()
def sample_latents(model: nn.Module, batch: Batch, noise: Tensor, sampler: Sampler, prediction: str = "x") -> Tensor:
    """The images' latents [n, l, P].

    Args:
        batch: the n captions, and behind them, unless guidance is 1, the n sequences without caption; one sample
            a row. Its latents are placeholders.
        noise: [n, l, P], where the flow starts.
        prediction: what the flow head predicts, `x` or `velocity`.

    Raises:
        ValueError: the batch does not hold n (or 2n) images of l latents.
    """
    n, latents, patch_dim = noise.shape
    copies = 2 if needs_unguided(sampler.guidance) else 1
    if batch.latents.shape != (copies * n * latents, patch_dim):
        raise ValueError(
            f"sampling {n} images of {latents} latents at guidance {sampler.guidance:g} needs "
            f"{copies * n * latents} latents in the batch, not {len(batch.latents)}"
        )
    x_LP = noise.reshape(-1, patch_dim).to(batch.latents)
    times = euler_times(sampler.steps, sampler.time_shift)
    prompts, images = cut_before_images(batch, latents)
    cache, nothing = KVCache(), torch.zeros_like(prompts.target, dtype=torch.bool)
    with torch.compiler.set_stance("force_eager"):  # a compiled block would be compiled again for every length
        model(prompts, logits_at=nothing, cache=cache)  # no time is in it: computed once for all steps
        cache.fixed = True
        for now, then in itertools.pairwise(times):
            by_time = _velocity(model, images, x_LP, now, sampler.guidance, prediction, cache)
            x_LP = x_LP + (then - now) * by_time
    return x_LP.view(n, latents, patch_dim)


def cut_before_images(batch: Batch, latents: int) -> tuple[Batch, Batch]:
    """Rows of one sample that ends in an image of so many latents -> what stands before the images, and the images.

    Raises:
        ValueError: a row that is not exactly one sample from place 0.
    """
    before_B1 = prompt_lengths(batch)[:, None] - latents
    words, image = (torch.arange(n, device=batch.kind.device) for n in (int(before_B1.max()), latents))
    prompts = _places(batch, words.expand(len(before_B1), -1))
    padding = words >= before_B1
    fill = {"tokens": 0, "kind": TEXT, "segment": -1, "span": -1}
    prompts |= {name: prompts[name].masked_fill(padding, value) for name, value in fill.items()}
    none = {name: getattr(batch, name)[:0] for name in ("latents", "codes", "latent_grid", "noise", "time")}
    read = {name: getattr(batch, name)[:0] for name in ("vit_patches", "vit_grid")}
    images = _places(batch, before_B1 + image)
    return dataclasses.replace(batch, **prompts, **none), dataclasses.replace(batch, **images, **read)


def _places(batch: Batch, place_BT: Tensor) -> dict[str, Tensor]:
    """The fields of the tokens at these places of each row."""
    names = ("tokens", "kind", "position", "segment", "span", "causal", "target", "task")
    return {name: getattr(batch, name).gather(1, place_BT) for name in names}


def _velocity(
    model: nn.Module, batch: Batch, x_LP: Tensor, time: float, guidance: float, prediction: str, cache: KVCache
) -> Tensor:
    """Classifier-free guidance: `v_free + g (v_caption - v_free)` (arXiv 2207.12598)."""
    guided = needs_unguided(guidance)
    all_x = torch.cat([x_LP, x_LP]) if guided else x_LP
    all_t = torch.full_like(batch.time, time)
    nothing = torch.zeros_like(batch.target, dtype=torch.bool)
    step = dataclasses.replace(batch, latents=all_x, noise=all_x, time=all_t)
    out = model(step, logits_at=nothing, cache=cache).prediction.to(all_x.dtype)
    velocity = velocity_from(out, all_x, all_t, prediction)
    if not guided:
        return velocity
    caption, free = velocity.chunk(2)
    return free + guidance * (caption - free)


def to_pixels(latents: Tensor, height: int, width: int) -> Tensor:
    """Latents [n, l, P] in [-1, 1] that are pixels -> uint8 [n, H, W, 3] on the CPU; what lies outside is clipped."""
    patch = math.isqrt(latents.shape[-1] // 3)
    images = unpatchify(latents.float(), height // patch, width // patch, patch)
    return ((images + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
