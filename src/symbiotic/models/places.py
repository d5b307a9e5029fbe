"""Where the tokens of a micro-batch stand: by kind, by row, and who may attend to whom. Computed once a forward.

Suffixes: B rows, T places a row, N = B*T tokens, M kinds.
"""

from __future__ import annotations

import itertools
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
        self.runs = [] if cache is not None or own.device.type != "cpu" else worth_cutting(batch.segment)
        self.mask = additive(own if cache is None else cache.mask(own))
        self.run_masks = cut(self.mask, self.runs)
        self._index: dict[tuple[str, ...], Tensor] = {}
        self._counted: list[float] = []

    def count(self, kinds: Sequence[str]) -> int:
        """Tokens of these kinds, padding not among them. The host waits for the first answer of a forward."""
        self._counted = self._counted or self.tokens_M.tolist()
        return int(sum(self._counted[KINDS.index(kind)] for kind in kinds))

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
    return x_ND @ w if ends_E is None else F.grouped_mm(*autocast(x_ND, w), offs=ends_E)


def autocast(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of the autocast that is on, as it would cast for `x @ w`: it does not know `grouped_mm` (torch
    2.15), and experts would be computed in float32. As they are where the kernel could not take them: it wants rows
    of a multiple of 16 bytes."""
    device = x.device.type
    aligned = all(size % 8 == 0 for size in (*x.shape[-1:], *w.shape[-2:]))
    if not (torch.is_autocast_enabled(device) and aligned):
        return x, w
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), w.to(dtype)


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


def additive(mask: Tensor) -> Tensor:
    """On the CPU 0 and -inf for True and False: there a kernel makes this of a boolean mask in every layer."""
    return mask if mask.device.type != "cpu" else torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))


def worth_cutting(segment_BT: Tensor, saved: int = 8192) -> list[int]:
    """Lengths of the samples, one after the other over all rows (padding is one too), if attention should take them
    one by one: if that saves so many pairs of query and key for every further call. Else []."""
    rows, width = segment_BT.shape
    first_BT = torch.ones_like(segment_BT, dtype=torch.bool)
    first_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    starts = first_BT.reshape(-1).nonzero().squeeze(-1)
    lengths = starts.diff(append=starts.new_tensor([rows * width]))
    worth = rows * width**2 - int(lengths.square().sum()) >= saved * len(lengths)
    return lengths.tolist() if worth else []


def cut(mask_B1TT: Tensor, lengths: list[int]) -> list[Tensor]:
    """The part [1, 1, L, L] of each sample in its row's mask."""
    width, ends = mask_B1TT.shape[-1], itertools.accumulate(lengths)
    places = [divmod(end - length, width) + (length,) for end, length in zip(ends, lengths, strict=True)]
    return [mask_B1TT[row : row + 1, :, at : at + length, at : at + length] for row, at, length in places]


def latent_rows(batch: Batch) -> Tensor:
    """[N] bool: places of the latents, in the order of `batch.latents`."""
    return (batch.kind == VAE).reshape(-1)
