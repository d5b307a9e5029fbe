"""From router logits to gates, and what is counted on the way.

Suffixes: N tokens, C router columns, E routed experts, K the k of top-k, M the four kinds of tokens, L MoE layers,
R routers. A router is the concatenation of the columns that a token sees; two kinds that see the same columns
share a router.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symbiotic.layout import pool_sizes, router_pools
from symbiotic.schema import KINDS, Model, Router, System


@dataclass
class RoutingStats:
    """What the routers of all MoE layers did with one micro-batch. Padding is not in it.

    `probs` carries gradient (the balance loss is made of it); `detach` before keeping. The last two are there only
    with a task router (R groups of experts, see `task_router.py`).
    """

    counts: Tensor  # [L, M, E] assignments of tokens of a kind to an expert
    probs: Tensor  # [L, M, E] sum over the tokens of a kind of the router's probabilities
    tokens: Tensor  # [M] tokens of a kind
    predicted: Tensor | None = None  # [L, M, R] tokens of a kind by the group that the task router predicts
    sent: Tensor | None = None  # [L, M, R] and by the group whose experts they used

    def detach(self) -> RoutingStats:
        return replace(self, counts=self.counts.detach(), probs=self.probs.detach(), tokens=self.tokens.detach())


class Columns:
    """The router columns of a system, in storage order: whose they are and who sees them.

    expert_C: the expert that a column scores, numbered pool after pool. visible_MC: kind sees column.
    visible_ME: kind sees expert. routers_RM: which kinds share a router. sees_RC: the columns of a router.
    by_task: a task router chooses the router of a token, so that its kind sees what it sees only if that is right.
    """

    def __init__(self, model: Model, system: System) -> None:
        self.by_task = system.task_router
        with torch.device("cpu"):  # real numbers also while a model is built on the meta device
            self._build(model, system)

    def _build(self, model: Model, system: System) -> None:
        sizes, pools = pool_sizes(model, system), router_pools(system)
        starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
        experts = {name: torch.arange(sizes[pool]) + starts[pool] for name, pool in pools.items()}
        self.expert_C = torch.cat(list(experts.values())) if experts else torch.zeros(0, dtype=torch.long)
        sees = [
            torch.cat([torch.full((len(e),), name in system.visible[kind]) for name, e in experts.items()])
            for kind in KINDS
            if experts
        ]
        self.visible_MC = torch.stack(sees) if sees else torch.zeros(len(KINDS), 0, dtype=torch.bool)
        num_experts = sum(sizes.values())
        self.visible_ME = torch.zeros(len(KINDS), num_experts, dtype=torch.bool)
        for m in range(len(KINDS)):
            self.visible_ME[m, self.expert_C[self.visible_MC[m]]] = True
        self.one_to_one = bool(torch.equal(self.expert_C, torch.arange(num_experts)))
        kinds_by_view: dict[tuple[bool, ...], list[int]] = {}
        for m, row in enumerate(self.visible_MC.tolist()):
            kinds_by_view.setdefault(tuple(row), []).append(m)
        self.routers_RM = torch.zeros(len(kinds_by_view), len(KINDS))
        for r, kinds in enumerate(kinds_by_view.values()):
            self.routers_RM[r, kinds] = 1.0
        self.sees_RC = self.visible_MC[self.routers_RM.argmax(1)]


def route(
    logits_NC: Tensor, visible_NC: Tensor | None, cfg: Router, bias_C: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, chosen columns and probabilities: `p = softmax(x W_g)`, `S = top_k(p)`, `w_i = p_i / sum_S p_j`.

    visible_NC: None where every token sees every column. bias_C: `S = top_k(p + b)`; the gates stay those of p
    (arXiv 2408.15664). Returns gates [N, K], columns [N, K], probs [N, C] (rows sum to one over the visible columns,
    for sigmoid scores too).
    """
    if visible_NC is not None:
        logits_NC = logits_NC.masked_fill(~visible_NC, float("-inf"))
    scores_NC = logits_NC.float().softmax(-1) if cfg.score == "softmax" else logits_NC.float().sigmoid()
    if bias_C is None:
        gates_NK, columns_NK = scores_NC.topk(cfg.top_k, dim=-1)
    else:
        chosen_by_NC = scores_NC.detach() + bias_C
        if visible_NC is not None:
            chosen_by_NC = chosen_by_NC.masked_fill(~visible_NC, float("-inf"))
        columns_NK = chosen_by_NC.topk(cfg.top_k, dim=-1).indices
        gates_NK = scores_NC.gather(1, columns_NK)
    if cfg.normalize:
        gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)
    probs_NC = scores_NC if cfg.score == "softmax" else scores_NC / scores_NC.sum(-1, keepdim=True)
    return gates_NK * cfg.scale, columns_NK, probs_NC


def straight_through(gates_NK: Tensor, columns_NK: Tensor, probs_NC: Tensor) -> Tensor:
    """`g + p - sg(p)`: the gates bit for bit, with the gradient of the probabilities (ours, for gates of one)."""
    probs_NK = probs_NC.gather(1, columns_NK)
    return gates_NK + (probs_NK - probs_NK.detach())


def bias_update(counts_LME: Tensor, columns: Columns, rate: float) -> Tensor:
    """[L, C]: what aux-loss-free balancing adds to the biases after a step, `u sign(mean load - load)` per router.

    counts_LME: assignments of the step, over all micro-batches and ranks. Where routers share a column, the sign is
    that of the sum of their differences. Zero for the columns of routers without a token. A router's tokens are those
    of its kinds, or by task, those that chose its experts.
    """
    difference_LC = counts_LME.new_zeros(len(counts_LME), len(columns.expert_C))
    members_RM = torch.ones_like(columns.routers_RM) if columns.by_task else columns.routers_RM
    for kinds_M, sees_C in zip(members_RM.to(counts_LME.device), columns.sees_RC.to(counts_LME.device), strict=True):
        load_LC = torch.einsum("m,lmc->lc", kinds_M.to(counts_LME.dtype), counts_LME[:, :, columns.expert_C])
        mean_L1 = (load_LC * sees_C).sum(1, keepdim=True) / sees_C.sum().clamp(min=1)
        difference_LC += (mean_L1 - load_LC) * sees_C
    return rate * difference_LC.sign()


def count_by_kind(columns_NK: Tensor, kinds_NM: Tensor, num_columns: int) -> Tensor:
    """[M, C]: how often each column was chosen by tokens of each kind. kinds_NM is one-hot, zero at padding."""
    chosen_NC = kinds_NM.new_zeros(len(columns_NK), num_columns).scatter_(1, columns_NK, 1.0)
    return kinds_NM.T @ chosen_NC


def columns_to_experts(values_MC: Tensor, expert_C: Tensor, num_experts: int) -> Tensor:
    """[M, C] -> [M, E]: sums the columns of an expert (a kind sees one of them at most)."""
    return values_MC.new_zeros(len(values_MC), num_experts).index_add(1, expert_C, values_MC)
