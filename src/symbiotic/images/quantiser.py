"""A small codebook that is fully used: moving averages, k-means at the start, dead codes revived.

Shapes: N vectors, K codes, D numbers each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def nearest(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """[N] number of the nearest code by Euclidean distance; the first of equals."""
    return (codes_KD.square().sum(1) - 2 * z_ND @ codes_KD.T).argmin(1)


def k_means(z_ND: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """[k, D] centres by Lloyd's algorithm. Centres that nobody is nearest to move to drawn vectors."""
    if len(z_ND) < k:
        raise ValueError(f"{k} codes need at least as many patches to start from, not {len(z_ND)}")
    centres_KD = z_ND[torch.randperm(len(z_ND), generator=generator)[:k]].clone()
    for _ in range(rounds):
        sums_KD, counts_K = totals(z_ND, nearest(z_ND, centres_KD), k)
        drawn_KD = z_ND[torch.randint(len(z_ND), (k,), generator=generator)]
        centres_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K.clamp(min=1)[:, None], drawn_KD)
    return centres_KD


def totals(z_ND: Tensor, numbers_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[k, D] sum and [k] count of the vectors of each code."""
    chosen_NK = F.one_hot(numbers_N, k).to(z_ND.dtype)
    return chosen_NK.T @ z_ND, chosen_NK.sum(0)


class Codebook(nn.Module):
    """Codes that follow the vectors nearest to them (VQ-VAE, arXiv 1711.00937, appendix A.1).

    Only `codes` is part of the state; the averages live as long as the training.

    Args:
        size, dim: K and D. decay: of the moving averages.
    """

    codes: Tensor

    def __init__(self, size: int, dim: int, decay: float = 0.97) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.zeros(size, dim))
        self.sums_KD, self.counts_K = torch.zeros(size, dim), torch.zeros(size)

    def forward(self, z_ND: Tensor) -> Tensor:
        return nearest(z_ND, self.codes)

    @torch.no_grad()
    def start(self, z_ND: Tensor, generator: torch.Generator) -> None:
        """k-means on vectors of the encoder (SoundStream, arXiv 2107.03312, section III-C)."""
        self.codes.copy_(k_means(z_ND, len(self.codes), 20, generator))
        self.sums_KD, self.counts_K = self.codes.clone(), torch.ones(len(self.codes))

    @torch.no_grad()
    def follow(self, z_ND: Tensor, numbers_N: Tensor) -> None:
        """Equations 7 and 8 of the source: moving averages of counts and sums, and the codes that they give."""
        sums_KD, counts_K = totals(z_ND, numbers_N, len(self.codes))
        self.sums_KD.lerp_(sums_KD, 1 - self.decay)
        self.counts_K.lerp_(counts_K, 1 - self.decay)
        self.codes.copy_(self.sums_KD / self.counts_K.clamp(min=1e-5)[:, None])

    @torch.no_grad()
    def revive(self, z_ND: Tensor, least: float, generator: torch.Generator) -> int:
        """Put codes with fewer than `least` vectors a batch at vectors of this one, the worst served first (random
        restarts: Jukebox, arXiv 2005.00341, section 3.1). Returns how many."""
        dead_K = torch.nonzero(self.counts_K < least).flatten()
        if not len(dead_K):
            return 0
        error_N = (z_ND - self.codes[self(z_ND)]).square().sum(1)
        drawn = torch.multinomial(error_N + 1e-12, len(dead_K), generator=generator)
        self.codes[dead_K] = z_ND[drawn]
        self.sums_KD[dead_K], self.counts_K[dead_K] = z_ND[drawn] * least, torch.full((len(dead_K),), least)
        return len(dead_K)
