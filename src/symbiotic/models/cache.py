"""Keys and values of the tokens that a decoder has seen, so that each step computes its own tokens only.

Suffixes: B rows, S places seen so far, T places of this step, G key/value heads, h head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from symbiotic.models.batch import Batch


class KVCache:
    """One sample a row: the prompt in the first forward, padded on the right, then any number of tokens a forward.

    Padding stays in it, masked. Keys and values lie in tensors with room behind them, so that a step writes its own
    only; nothing goes back through them. fixed: nothing is added any more, so that the same places can be computed
    again and again (the flow's steps).
    """

    def __init__(self) -> None:
        self.fixed = False
        self.seen_BS: Tensor | None = None
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def mask(self, own_B1TT: Tensor) -> Tensor:
        """[B, 1, T, S + T]: the mask of these tokens among themselves, behind what each row has seen."""
        if self.seen_BS is None:
            return own_B1TT
        before = self.seen_BS[:, None, None, :].expand(-1, 1, own_B1TT.shape[2], -1)
        return torch.cat([before, own_B1TT], dim=-1)

    @torch.no_grad()
    def extended(self, layer: nn.Module, k_BGTh: Tensor, v_BGTh: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer with those of this step behind them, [B, G, S + T, h]; good until the next one."""
        if self.seen_BS is None:
            self._kept[layer] = (k_BGTh, v_BGTh)
            return k_BGTh, v_BGTh
        before = self.seen_BS.shape[1]
        after = before + k_BGTh.shape[2]
        if self._kept[layer][0].shape[2] < after:
            k, v = self._kept[layer]
            self._kept[layer] = _roomy(k, before, after), _roomy(v, before, after)
        k, v = self._kept[layer]
        k[:, :, before:after], v[:, :, before:after] = k_BGTh, v_BGTh
        return k[:, :, :after], v[:, :, :after]

    def keep(self, batch: Batch) -> None:
        """Called by the model at the end of a forward: the tokens of `batch` are seen from now on."""
        if self.fixed:
            return
        valid_BT = batch.segment >= 0
        self.seen_BS = valid_BT if self.seen_BS is None else torch.cat([self.seen_BS, valid_BT], dim=1)


def _roomy(kept_BGSh: Tensor, before: int, after: int) -> Tensor:
    """The first `before` places in a tensor with room for twice `after`."""
    rows, heads, _, width = kept_BGSh.shape
    made = kept_BGSh.new_empty(rows, heads, 2 * after, width)
    made[:, :, :before] = kept_BGSh[:, :, :before]
    return made
