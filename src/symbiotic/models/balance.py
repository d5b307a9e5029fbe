"""The balance loss per router, and the router z-loss.

Suffixes as in `routing.py`: L MoE layers, R routers, M kinds, E routed experts, N tokens, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symbiotic.models.routing import RoutingStats
from symbiotic.schema import KINDS, Balance


def balance_loss(stats: RoutingStats, routers_RM: Tensor, visible_ME: Tensor, cfg: Balance | None = None) -> Tensor:
    """`n_g * sum_i f_i P_i` per router g and layer, averaged over the routers that had tokens, and over the layers.

    f_i is the share of the router's assignments that expert i got, P_i the mean router probability (Switch,
    arXiv 2101.03961, eq. 4-6, per router as in Symbiotic-MoE). It is 1 when f or P is uniform. Returns []. A router
    counts by the mean weight of its tokens' kinds (ours).
    routers_RM: which kinds share a router. visible_ME: the experts of a kind's router. cfg: scope, reduction and
    weights of the kinds (see `schema.Balance`). With a task router, the tokens of a router are those sent to it.
    """
    cfg = cfg or Balance()
    if stats.counts.shape[0] == 0:
        return stats.probs.sum()
    members_RM = torch.ones_like(routers_RM[:1]) if cfg.scope == "global" else routers_RM
    sees_RE = (members_RM @ visible_ME.to(members_RM.dtype)) > 0
    members_RM = members_RM if stats.sent is None else torch.ones_like(members_RM)  # any token may be sent to it
    present_R = tokens_of(stats, members_RM)
    if cfg.kinds:
        weights = [cfg.kinds.get(kind, 1.0) for kind in KINDS]
        members_RM = members_RM * torch.tensor(weights, dtype=members_RM.dtype, device=members_RM.device)
    counts_LRE = (members_RM @ stats.counts) * sees_RE
    probs_LRE = (members_RM @ stats.probs) * sees_RE
    tokens_R = tokens_of(stats, members_RM)
    smallest = torch.finfo(counts_LRE.dtype).tiny
    share_LRE = counts_LRE / counts_LRE.sum(-1, keepdim=True).clamp(min=smallest)
    mean_LRE = probs_LRE / tokens_R[..., None].clamp(min=smallest)
    per_router_LR = sees_RE.sum(-1) * (share_LRE * mean_LRE).sum(-1)
    weight_R = tokens_R / present_R.clamp(min=smallest)  # of its tokens on average; without weights 1, 0 if it has none
    per_layer_L = (per_router_LR * weight_R).sum(-1) / (present_R > 0).sum(-1).clamp(min=1)
    return per_layer_L.mean() if cfg.reduction == "mean" else per_layer_L.sum()


def tokens_of(stats: RoutingStats, members_RM: Tensor) -> Tensor:
    """Weighted tokens of each router: [R], or [L, R] of those that the task routers of the layers sent to it."""
    if stats.sent is None or len(members_RM) == 1:
        return members_RM @ stats.tokens
    return (members_RM * stats.sent.mT).sum(-1)


def z_loss(logits_NC: Tensor, visible_NC: Tensor | None, valid_N: Tensor) -> Tensor:
    """`mean(logsumexp(logits)^2)` over the tokens that are no padding (ST-MoE, arXiv 2202.08906, eq. 5)."""
    if visible_NC is not None:
        logits_NC = logits_NC.masked_fill(~visible_NC, float("-inf"))
    squares_N = logits_NC.float().logsumexp(-1).square()
    return (squares_N * valid_N).sum() / valid_N.sum().clamp(min=1)
