"""Sampling of image codes one by one, with the keys and values of what stands before kept.

Each image's draws are a function of (seed, number) alone, whatever the batch.
Shapes: n images, l codes an image, K size of the codebook, R rows: n, or 2 n with guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.generation.images import needs_unguided
from symbiotic.generation.text import one_place, prompt_lengths
from symbiotic.models.batch import VAE, Batch
from symbiotic.models.cache import KVCache
from symbiotic.objectives.autoregressive import START
from symbiotic.schema import Sampler


def start_draws(seed: int, indices: Sequence[int], codes: int) -> Tensor:
    """[n, l] float64, uniform in [0, 1): what picks each code among the likely ones."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, i]).random(codes) for i in indices]))


def likely(logits_nK: Tensor, sampler: Sampler) -> Tensor:
    """[n, K] float64 probabilities to draw from: of `logits / temperature`, among the `top_k` likeliest codes, and of
    these the fewest whose probabilities reach `top_p` (arXiv 1904.09751)."""
    logits_nK = logits_nK.double()
    if sampler.temperature == 0:
        return torch.zeros_like(logits_nK).scatter_(1, logits_nK.argmax(1, keepdim=True), 1.0)
    ordered_nK, codes_nK = (logits_nK / sampler.temperature).sort(dim=1, descending=True, stable=True)
    if sampler.top_k:
        ordered_nK[:, sampler.top_k :] = float("-inf")
    probs_nK = ordered_nK.softmax(1)
    before_nK = probs_nK.cumsum(1) - probs_nK
    probs_nK = probs_nK.masked_fill((before_nK >= sampler.top_p) & (before_nK > 0), 0.0)
    return torch.zeros_like(probs_nK).scatter_(1, codes_nK, probs_nK / probs_nK.sum(1, keepdim=True))


def pick(probs_nK: Tensor, draws_n: Tensor) -> Tensor:
    """[n] codes: the first whose cumulated probability exceeds the draw."""
    cumulated_nK = probs_nK.cumsum(1)
    total_n1 = cumulated_nK[:, -1:]
    draws_n1 = draws_n[:, None].to(probs_nK) * total_n1
    found_n = torch.searchsorted(cumulated_nK, draws_n1, right=True).squeeze(1)
    last_n = (probs_nK > 0).long().mul(torch.arange(1, probs_nK.shape[1] + 1, device=probs_nK.device)).argmax(1)
    return found_n.minimum(last_n)


def guided(logits_RK: Tensor, guidance: float) -> Tensor:
    """[n, K] `free + g (caption - free)`, on logits (arXiv 2207.12598)."""
    if not needs_unguided(guidance):
        return logits_RK
    caption, free = logits_RK.chunk(2)
    return free + guidance * (caption - free)


@torch.no_grad()
def sample_codes(model: nn.Module, prompts: Batch, grid: Tensor, draws: Tensor, sampler: Sampler) -> Tensor:
    """The images' codes, int64 [n, l].

    Args:
        prompts: the n captions and, unless guidance is 1, the n sequences without caption; up to the place where an
            image begins, one a row.
        grid: [l, 2] row and column of each code. draws: [n, l] of `start_draws`.

    Raises:
        ValueError: the batch does not hold n (or 2n) prompts.
    """
    n, copies = len(draws), 2 if needs_unguided(sampler.guidance) else 1
    length_R = prompt_lengths(prompts)
    if len(length_R) != copies * n:
        raise ValueError(f"{n} images at guidance {sampler.guidance:g} need {copies * n} prompts, not {len(length_R)}")
    cache, nothing = KVCache(), torch.zeros_like(prompts.target, dtype=torch.bool)
    draws, made = draws.to(length_R.device), [torch.full((n,), START - 1, device=length_R.device)]
    with torch.compiler.set_stance("force_eager"):  # a compiled block would be compiled again for every length
        model(prompts, logits_at=nothing, cache=cache)
        for place, at in enumerate(grid.to(length_R.device)):
            step = next_code(prompts, made[-1].repeat(copies) + 1, length_R + place, at)
            logits_RK = model(step, logits_at=nothing[:, :1], cache=cache).prediction
            made.append(pick(likely(guided(logits_RK, sampler.guidance), sampler), draws[:, place]))
    return torch.stack(made[1:], dim=1)


def next_code(prompts: Batch, code_R: Tensor, position_R: Tensor, grid_2: Tensor) -> Batch:
    """One place a row: the input of the code that stands at `grid_2`."""
    rows = len(code_R)
    image = torch.ones_like(code_R)[:, None]
    none = torch.zeros(rows, 0, device=code_R.device)
    return one_place(
        prompts,
        kind=image * VAE,
        position=position_R[:, None],
        span=image,
        causal=image == 1,
        latents=none,
        codes=code_R,
        latent_grid=grid_2.expand(rows, 2),
        noise=none,
        time=torch.zeros(rows, device=code_R.device),
    )
