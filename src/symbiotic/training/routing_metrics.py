"""How evenly tokens use the experts: pure functions on counts of assignments (spec: systems.md section 6).

Shapes: `counts` [..., E] assignments per expert, `visible` [..., E] bool, which experts the tokens may use; leading
dimensions broadcast. k is the router's top-k, so N tokens make N*k assignments. Invisible experts never count.
Suffixes: F capacity factors, L MoE layers, M kinds of tokens, G groups of kinds, E experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from scipy.special import bdtrc  # (c, n, p) -> P(Binomial(n, p) > c)
from torch import Tensor

from symbiotic.schema import KINDS

GROUPS: dict[str, tuple[int, ...]] = {
    **{kind: (i,) for i, kind in enumerate(KINDS)},
    "und": (0, 1, 2),
    "all": (0, 1, 2, 3),
}
"""Name in a metric -> kinds whose tokens are taken together: each kind, what understanding reads (everything but
latents), and everything. Pooled numbers hide a collapse that each kind shows: read the kinds first."""

Metric = Callable[[Tensor, Tensor], Tensor]  # counts [..., E], visible [..., E] -> [...]

ACTIVE_LOAD = 0.1  # an expert is active when its load is above this share of the mean load


def capacity(num_tokens: Tensor, top_k: int, num_experts: Tensor, factor: float, c_min: int = 1) -> Tensor:
    """`C = max(C_min, floor(k N cf / E))`: assignments that one expert of a capacity-limited MoE would take."""
    room = top_k * num_tokens * factor / num_experts.clamp(min=1)
    return torch.floor(room + 1e-9).clamp(min=c_min)


def capacity_rate(counts: Tensor, visible: Tensor, factor: float = 1.0, c_min: int = 1) -> Tensor:
    """`sum_e min(n_e, C) / (N k)`: share of the assignments that a capacity-limited MoE would keep.

    A diagnostic: nothing is dropped. k/E at total collapse (where C_min and the floor do not bind), never above 1;
    its ceiling depends on N (`random_capacity_rate`). NaN without tokens. Returns [...].
    """
    counts = counts.double() * visible
    total = counts.sum(-1)  # N*k
    limit = capacity(total, 1, visible.sum(-1), factor, c_min)
    return counts.minimum(limit[..., None]).sum(-1) / total


@functools.lru_cache(maxsize=1 << 16)
def random_capacity_rate(num_tokens: int, top_k: int, num_experts: int, factor: float = 1.0, c_min: int = 1) -> float:
    """The capacity rate to expect when every token picks k of E experts uniformly, without replacement.

    Exact: the load X of one expert is then Binomial(N, p = k/E), and expectations add up over experts, so the rate is
    E[min(X, C)] / (N p) = 1 - E[(X - C)+] / (N p), where
    E[(X - C)+] = N p P(Binomial(N - 1, p) >= C) - C P(X > C). NaN without tokens or experts.
    """
    if num_tokens == 0 or num_experts == 0:
        return math.nan
    p, mean = top_k / num_experts, num_tokens * top_k / num_experts
    limit = max(c_min, math.floor(mean * factor + 1e-9))
    if p >= 1.0:
        return min(1.0, limit / mean)
    if limit >= num_tokens:
        return 1.0
    over = mean * float(bdtrc(limit - 1, num_tokens - 1, p)) - limit * float(bdtrc(limit, num_tokens, p))
    return min(1.0, 1.0 - over / mean)


def loads(counts: Tensor, visible: Tensor) -> Tensor:
    """[..., E]: each expert's share of the assignments; sums to 1 (NaN without tokens)."""
    counts = counts.double() * visible
    return counts / counts.sum(-1, keepdim=True)


def utilisation(counts: Tensor, visible: Tensor) -> Tensor:
    """`exp(H(load)) / E` in [1/E, 1]: the effective share of the experts. The source paper defines none; ours."""
    load = loads(counts, visible)
    return torch.exp(-torch.xlogy(load, load).sum(-1)) / visible.sum(-1)


def active(counts: Tensor, visible: Tensor) -> Tensor:
    """Share of the experts with a load above 0.1/E."""
    num_experts = visible.sum(-1)
    used = (loads(counts, visible) * num_experts[..., None] > ACTIVE_LOAD) & visible
    return used.sum(-1) / num_experts.double()


def dead(counts: Tensor, visible: Tensor) -> Tensor:
    """Share of the experts that no token chose."""
    return ((counts == 0) & visible).sum(-1) / visible.sum(-1).double()


def max_vio(counts: Tensor, visible: Tensor) -> Tensor:
    """`max n / mean n - 1` (DeepSeek, arXiv 2408.15664): 0 at balance, E/k - 1 at total collapse."""
    return loads(counts, visible).amax(-1) * visible.sum(-1) - 1.0


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """[...]: `H((p + q) / 2) - (H(p) + H(q)) / 2` in bits, of distributions [..., E]: 0 for equal, 1 for disjoint."""

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1) / math.log(2)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def overlap(counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """`1 - JS(load_a, load_b)` with logarithms of base 2: 1 for equal loads, 0 for disjoint experts."""
    everywhere = torch.ones_like(counts_a, dtype=torch.bool)
    return 1.0 - js_divergence(loads(counts_a, everywhere), loads(counts_b, everywhere))


def drift(now_LNE: Tensor, reference_LNE: Tensor) -> Tensor:
    """[L]: mean over tokens of the Jensen-Shannon divergence (bits) of a router's probabilities now and before."""
    return js_divergence(now_LNE.double(), reference_LNE.double()).mean(-1)


def miscount(counts: Tensor, tokens: Tensor, top_k: int) -> str | None:
    """What is wrong when a layer's counts [L, M, E] are not k assignments for each of the tokens [M]; else None."""
    wrong = (counts.sum(-1) - top_k * tokens).abs() > 0.5
    if not bool(wrong.any()):
        return None
    layer, kind = wrong.nonzero()[0].tolist()
    return (
        f"routing counts: layer {layer} has {counts[layer, kind].sum():g} assignments of {KINDS[kind]} tokens, "
        f"expected {top_k} x {tokens[kind]:g}"
    )


def over_routers(metric: Metric, counts: Tensor, visible: Tensor, sees_RE: Tensor | None) -> Tensor:
    """[...]: a metric of tokens that a task router sent to several groups of experts (ours).

    The mean of what it is in each group, weighted by the assignments there: where every token is sent by its kind it is
    the metric of that kind's router. sees_RE: the experts of each group; None: one router a kind, the metric itself.
    """
    if sees_RE is None:
        return metric(counts, visible)
    counts_RE, visible_RE = counts.double()[..., None, :] * sees_RE, visible[..., None, :] & sees_RE
    share = counts_RE.sum(-1) / counts.double().sum(-1, keepdim=True)
    return (share * metric(counts_RE, visible_RE).where(counts_RE.sum(-1) > 0, 0.0)).sum(-1)


# --------------------------------------------------------------------------- sums over micro-batches


@functools.cache
def _member(device: torch.device) -> Tensor:
    """[G, M]: 1.0 where a kind belongs to a group."""
    rows = [[float(m in kinds) for m in range(len(KINDS))] for kinds in GROUPS.values()]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def by_group(counts: Tensor, tokens: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """counts [L, M, E] and visible [M, E] of the kinds -> [L, G, E] and [G, E] of the groups.

    A group sees what those of its kinds see that have tokens [M].
    """
    member = _member(counts.device)
    return member @ counts.double(), (member * (tokens > 0)) @ visible.double() > 0


def capacity_sums(
    counts: Tensor, tokens: Tensor, visible: Tensor, factors: Sequence[float], sees_RE: Tensor | None = None
) -> dict[str, Tensor]:
    """What one micro-batch adds to a window's sums; on the device of its counts, without a transfer to the host.

    counts [L, M, E], tokens [M], visible [M, E], sees_RE as in `over_routers`. Returns counts, tokens, the rates
    `capacity` [F, L, G] (0 for a group without tokens), and `micro_batches` [G], 1.0 for a group with tokens.
    """
    counts_LGE, visible_GE = by_group(counts, tokens, visible)
    present_G = _member(counts.device) @ tokens.double() > 0
    rates = (functools.partial(capacity_rate, factor=factor) for factor in factors)
    rates_FLG = torch.stack([over_routers(rate, counts_LGE, visible_GE, sees_RE) for rate in rates])
    rates_FLG = rates_FLG.where(present_G, 0.0)
    return {"counts": counts, "tokens": tokens, "capacity": rates_FLG, "micro_batches": present_G.double()}


def random_rates(tokens: Sequence[float], visible: Tensor, top_k: int, factors: Sequence[float]) -> list[list[float]]:
    """[F][G]: `random_capacity_rate` of one micro-batch's tokens [M]: what its capacity rates compare with.

    0 for a group without tokens, NaN where the kinds of a group see different experts. visible [M, E] on the CPU.
    """
    sees = [tuple(row) for row in visible.tolist()]
    columns = []
    for kinds in GROUPS.values():
        present = [m for m in kinds if tokens[m] > 0]
        views = {sees[m] for m in present}
        number, num_experts = round(sum(tokens[m] for m in present)), sum(next(iter(views), ()))
        if len(views) == 1:
            columns.append([random_capacity_rate(number, top_k, num_experts, factor) for factor in factors])
        else:
            columns.append([math.nan if views else 0.0] * len(factors))
    return [list(row) for row in zip(*columns, strict=True)]


def summarise(
    sums: Mapping[str, Tensor],
    visible: Tensor,
    factors: Sequence[float] = (1.0, 1.25),
    sees_RE: Tensor | None = None,
) -> dict[str, float]:
    """All routing metrics of a window of training under stable names; every system logs the same ones.

    sums: over the micro-batches of the window, of `capacity_sums`, and `random` [F, G] of `random_rates`, best on the
    CPU; visible [M, E] as in `UnifiedModel.visible_experts`; sees_RE as in `over_routers`. For every group g of
    `GROUPS` that has tokens, as the mean over layers and per layer i:

        routing/capacity@1/g  routing/capacity@1.25/g  routing/utilisation/g  routing/active/g  routing/dead/g
        routing/maxvio/g      routing/overlap/text-vae and the same under routing/layer{i}/...

    and routing/capacity@1/g/random, the rate of uniform random routing (equal in every layer; left out where the kinds
    of a group see different experts). Capacity rates depend on the number of tokens: they and their baseline are means
    over the micro-batches in which the group had tokens. The others are those of the whole window's counts. Layers are
    numbered among the MoE layers, from 0. Empty without MoE layers.
    """
    counts, tokens = sums["counts"].double(), sums["tokens"]
    if not counts.shape[0] or not counts.shape[-1]:
        return {}
    counts_LGE, visible_GE = by_group(counts, tokens, visible)
    names = {"utilisation": utilisation, "active": active, "dead": dead, "maxvio": max_vio}
    mean_FLG = sums["capacity"] / sums["micro_batches"]
    table = {f"capacity@{factor:g}": rate_LG for factor, rate_LG in zip(factors, mean_FLG, strict=True)}
    table |= {name: over_routers(metric, counts_LGE, visible_GE, sees_RE) for name, metric in names.items()}
    out = _named(
        table, [g for g, number in enumerate((_member(counts.device) @ tokens.double()).tolist()) if number > 0]
    )
    text, vae = KINDS.index("text"), KINDS.index("vae")
    if tokens[text] > 0 and tokens[vae] > 0:
        out |= by_layer("overlap/text-vae", overlap(counts[:, text], counts[:, vae]))
    random_FG = (sums["random"] / sums["micro_batches"]).tolist()
    for factor, row in zip(factors, random_FG, strict=True):
        known = {name: rate for name, rate in zip(GROUPS, row, strict=True) if not math.isnan(rate)}
        out |= {f"routing/capacity@{factor:g}/{name}/random": rate for name, rate in known.items()}
    return out


def by_layer(metric: str, values_L: Tensor, family: str = "routing") -> dict[str, float]:
    """One metric's values per layer, and their mean, under its names."""
    rows = {f"{family}/layer{i}/{metric}": value for i, value in enumerate(values_L.tolist())}
    return {f"{family}/{metric}": float(values_L.mean()), **rows}


def _named(table: Mapping[str, Tensor], shown: Sequence[int]) -> dict[str, float]:
    """Metric -> [L, G] to one entry per name, of the groups `shown`: means over layers first, then the layers."""
    groups = list(GROUPS)
    pooled = {metric: value.mean(0).tolist() for metric, value in table.items()}
    out = {f"routing/{metric}/{groups[g]}": row[g] for metric, row in pooled.items() for g in shown}
    layers = {metric: value.tolist() for metric, value in table.items()}
    for i in range(len(next(iter(table.values())))):
        prefix = f"routing/layer{i}"
        out |= {f"{prefix}/{metric}/{groups[g]}": rows[i][g] for metric, rows in layers.items() for g in shown}
    return out
