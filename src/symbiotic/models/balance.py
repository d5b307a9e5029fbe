"""The balance loss per router, and the router z-loss.

Suffixes as in `routing.py`: L MoE layers, R routers, M kinds, E routed experts, N tokens, C columns.
"""

from __future__ import annotations

from torch import Tensor

from symbiotic.models.routing import RoutingStats


def balance_loss(stats: RoutingStats, routers_RM: Tensor, visible_ME: Tensor) -> Tensor:
    """`n_g * sum_i f_i P_i` per router g and layer, averaged over the layers and the routers that had tokens.

    f_i is the share of the router's assignments that expert i got, P_i the mean router probability (Switch,
    arXiv 2101.03961, eq. 4-6, per router as in Symbiotic-MoE). It is 1 when f or P is uniform. Returns [].
    """
    if stats.counts.shape[0] == 0:
        return stats.probs.sum()
    counts_LRE = routers_RM @ stats.counts
    probs_LRE = routers_RM @ stats.probs
    tokens_R = routers_RM @ stats.tokens
    experts_R = ((routers_RM @ visible_ME.float()) > 0).sum(-1)
    share_LRE = counts_LRE / counts_LRE.sum(-1, keepdim=True).clamp(min=1.0)
    mean_LRE = probs_LRE / tokens_R[:, None].clamp(min=1.0)
    per_router_LR = experts_R * (share_LRE * mean_LRE).sum(-1)
    present_R = (tokens_R > 0).float()
    return (per_router_LR.mean(0) * present_R).sum() / present_R.sum().clamp(min=1.0)


def z_loss(logits_NC: Tensor, visible_NC: Tensor | None, valid_N: Tensor) -> Tensor:
    """`mean(logsumexp(logits)^2)` over the tokens that are no padding (ST-MoE, arXiv 2202.08906, eq. 5)."""
    if visible_NC is not None:
        logits_NC = logits_NC.masked_fill(~visible_NC, float("-inf"))
    squares_N = logits_NC.float().logsumexp(-1).square()
    return (squares_N * valid_N).sum() / valid_N.sum().clamp(min=1)
