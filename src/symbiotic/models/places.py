"""Where the tokens of a micro-batch stand: by kind, by row, and who may attend to whom. Computed once a forward.

Suffixes: B rows, T places a row, N = B*T tokens, M kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from symbiotic.models.batch import VAE, Batch
from symbiotic.schema import KINDS


class Places:
    """Token places of one batch, flat, and the masks derived from them.

    shield: [] float level in [0, 1], or None where no gradient is to be shielded (evaluation, sampling).
    """

    def __init__(self, batch: Batch, shield: Tensor | None) -> None:
        self.shape = tuple(batch.kind.shape)
        self.kind_N = batch.kind.reshape(-1)
        self.valid_N = batch.segment.reshape(-1) >= 0
        self.shield = shield if shield is not None and torch.is_grad_enabled() else None
        one_hot = F.one_hot(self.kind_N, len(KINDS)).float()
        self.kinds_NM = one_hot * self.valid_N[:, None]
        self.tokens_M = self.kinds_NM.sum(0)
        self.mask = attention_mask(batch)
        self._index: dict[tuple[str, ...], Tensor] = {}

    def index(self, kinds: Sequence[str]) -> Tensor:
        """[n] flat places of the tokens of these kinds, padding included (it has a kind, but nobody reads it)."""
        key = tuple(kinds)
        if key not in self._index:
            self._index[key] = self.is_kind(kinds).nonzero().squeeze(-1)
        return self._index[key]

    def is_kind(self, kinds: Sequence[str]) -> Tensor:
        """[N] bool."""
        wanted = torch.tensor([k in kinds for k in KINDS], device=self.kind_N.device)
        return wanted[self.kind_N]

    def gradient_scale(self, kinds: Sequence[str] | None) -> Tensor | None:
        """[N, 1] factor on the gradient of each token through a component shielded for `kinds`; None: no shield.

        It is `1 - level` for tokens of these kinds and 1 for the others.
        """
        if self.shield is None or not kinds:
            return None
        return torch.where(self.is_kind(kinds)[:, None], 1.0 - self.shield, 1.0)


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x, bit for bit, with its gradient multiplied by `scale`: `sg(x) + c (x - sg(x))` (Symbiotic-MoE).

    It stands in the forward graph and per token, because Adam is scale-free: scaling `.grad` afterwards is not
    the same thing. `scale` is a tensor, so that a change of phase changes no graph.
    """
    fixed = x.detach()
    return fixed + scale.to(x.dtype) * (x - fixed)


def attention_mask(batch: Batch) -> Tensor:
    """[B, 1, T, T] bool, True where the query (row) may attend to the key (column).

    Causal over a sample, bidirectional inside an image span unless the span is causal, nothing across packed
    samples (Symbiotic-MoE). Padding attends to padding, so that no row of the softmax is empty.
    """
    segment, span = batch.segment, batch.span
    places = torch.arange(segment.shape[1], device=segment.device)
    same_sample = segment[:, :, None] == segment[:, None, :]
    same_image = (span[:, :, None] == span[:, None, :]) & (span >= 0)[:, :, None] & ~batch.causal[:, :, None]
    earlier = places[:, None] >= places[None, :]
    return (same_sample & (earlier | same_image))[:, None]


def latent_rows(batch: Batch) -> Tensor:
    """[N] bool: places of the latents, in the order of `batch.latents`."""
    return (batch.kind == VAE).reshape(-1)
