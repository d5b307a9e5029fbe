"""Where the tokens of a micro-batch stand: by kind, by row, and who may attend to whom. Computed once a forward.

Suffixes: B rows, T places a row, N = B*T tokens, M kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from symbiotic.models.batch import VAE, Batch
from symbiotic.models.cache import KVCache
from symbiotic.schema import KINDS


class Places:
    """Token places of one batch, flat, and the masks derived from them.

    shield: [] float level in [0, 1], or None where no gradient is to be shielded (evaluation, sampling).
    trace: whether the MoE layers hand out what they did token by token. cache: keys and values of earlier tokens.
    by_truth: [] bool, whether task routers send tokens by their true task; None: by the predicted one.
    """

    def __init__(
        self,
        batch: Batch,
        shield: Tensor | None,
        trace: bool = False,
        by_truth: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.trace, self.by_truth, self.cache = trace, by_truth, cache
        self.shape = tuple(batch.kind.shape)
        self.kind_N = batch.kind.reshape(-1)
        self.valid_N = batch.segment.reshape(-1) >= 0
        self.shield = shield if shield is not None and torch.is_grad_enabled() else None
        one_hot = self.kind_N[:, None] == torch.arange(len(KINDS), device=self.kind_N.device)
        self.kinds_NM = (one_hot & self.valid_N[:, None]).float()
        self.tokens_M = self.kinds_NM.sum(0)
        own = attention_mask(batch)
        self.mask = own if cache is None else cache.mask(own)
        self._index: dict[tuple[str, ...], Tensor] = {}

    def index(self, kinds: Sequence[str]) -> Tensor:
        """[n] flat places of the tokens of these kinds, padding included (it has a kind, but nobody reads it)."""
        key = tuple(kinds)
        if key not in self._index:
            self._index[key] = self.is_kind(kinds).nonzero().squeeze(-1)
        return self._index[key]

    def find(self, groups: Iterable[Sequence[str]]) -> None:
        """Fill the cache of `index`: inside a compiled block, looking for places would break the graph."""
        for kinds in groups:
            self.index(kinds)

    def is_kind(self, kinds: Sequence[str]) -> Tensor:
        """[N] bool. No table of kinds is copied to the device, so that the host does not wait."""
        hit_N = torch.zeros_like(self.valid_N)
        for kind in kinds:
            hit_N = hit_N | (self.kind_N == KINDS.index(kind))
        return hit_N

    def gradient_scale(self, kinds: Sequence[str] | None) -> Tensor | None:
        """[N, 1] factor on the gradient of each token through a component shielded for `kinds`; None: no shield.

        It is `1 - level` for tokens of these kinds and 1 for the others. The level is only read on the device: another
        one changes no graph, and nothing waits for it.
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


class _Product(torch.autograd.Function):
    """`x @ w` whose gradient of w takes what each row adds to it times a scale; with `ends_E`, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w: Tensor, scale_N1: Tensor, ends_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, w, scale_N1, ends_E)
        return product(x_ND, w, ends_E=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w, scale_N1, ends_E = ctx.saved_tensors
        dtype = grad_NF.dtype  # under autocast that of the product, not of x and w
        by_x = product(grad_NF, w.mT.to(dtype), ends_E=ends_E)
        by_w = product(x_ND.mT.to(dtype), grad_NF * scale_N1.to(dtype), ends_E=ends_E)
        return by_x.to(x_ND.dtype), by_w.to(w.dtype), None, None


def product(x_ND: Tensor, w: Tensor, weight_scale_N1: Tensor | None = None, ends_E: Tensor | None = None) -> Tensor:
    """`x @ w` with w [D, F]; with w [E, D, F], expert by expert on rows sorted so, which end at `ends_E` (int32).

    weight_scale_N1: factor on what each row adds to the gradient of w; that of x, and the product, stay as they are.
    """
    if weight_scale_N1 is not None:
        return _Product.apply(x_ND, w, weight_scale_N1, ends_E)
    return x_ND @ w if ends_E is None else F.grouped_mm(x_ND, w, offs=ends_E)


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
