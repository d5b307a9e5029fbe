"""How evenly tokens use the experts: pure functions on counts of assignments (spec: systems.md section 6).

Shapes: `counts` [..., E] assignments per expert, `visible` [..., E] bool, which experts the tokens may use; leading
dimensions broadcast. k is the router's top-k, so N tokens make N*k assignments. Invisible experts never count.
Suffixes: L MoE layers, M kinds of tokens, G groups of kinds, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from symbiotic.schema import KINDS

GROUPS: dict[str, tuple[int, ...]] = {
    **{kind: (i,) for i, kind in enumerate(KINDS)},
    "und": (0, 1, 2),
    "all": (0, 1, 2, 3),
}
"""Name in a metric -> kinds whose tokens are taken together: each kind, what understanding reads (everything but
latents), and everything. Pooled numbers hide a collapse that each kind shows: read the kinds first."""

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


def random_capacity_rate(num_tokens: int, top_k: int, num_experts: int, factor: float = 1.0, c_min: int = 1) -> float:
    """The capacity rate to expect when every token picks k of E experts uniformly, without replacement.

    Exact: the load of one expert is then Binomial(N, p = k/E), and expectations add up over experts, so the rate is
    E[min(X, C)] / (N p) = 1 - E[(X - C)+] / (N p). The sum over the tail runs over 12 standard deviations, in double
    precision. NaN without tokens.
    """
    if num_tokens == 0:
        return math.nan
    p, mean = top_k / num_experts, num_tokens * top_k / num_experts
    limit = max(c_min, math.floor(mean * factor + 1e-9))
    if p >= 1.0:
        return min(1.0, limit / mean)
    width = 12 * math.sqrt(mean * (1 - p)) + 30
    low, high = max(limit + 1, math.floor(mean - width)), min(num_tokens, math.ceil(mean + width))
    if low > high:
        return 1.0
    x = torch.arange(low, high + 1, dtype=torch.float64)
    n = torch.tensor(float(num_tokens), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    mass = torch.exp(choose + x * math.log(p) + (n - x) * math.log1p(-p))
    return 1.0 - float(((x - limit) * mass).sum()) / mean


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


def overlap(counts_a: Tensor, counts_b: Tensor) -> Tensor:
    """`1 - JS(load_a, load_b)` with logarithms of base 2: 1 for equal loads, 0 for disjoint experts."""
    everywhere = torch.ones_like(counts_a, dtype=torch.bool)
    a, b = loads(counts_a, everywhere), loads(counts_b, everywhere)
    middle = (a + b) / 2

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1) / math.log(2)

    return 1.0 - (entropy(middle) - (entropy(a) + entropy(b)) / 2)


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


def summarise(
    counts: Tensor, tokens: Tensor, visible: Tensor, top_k: int, factors: Sequence[float] = (1.0, 1.25)
) -> dict[str, Tensor]:
    """All routing metrics of a window of training under stable names; every system logs the same ones.

    counts [L, M, E], tokens [M] and visible [M, E] as in `RoutingStats` and `UnifiedModel.visible_experts`, best on
    the CPU. For every group g of `GROUPS` that has tokens, as the mean over layers and per layer i:

        routing/capacity@1/g  routing/capacity@1.25/g  routing/utilisation/g  routing/active/g  routing/dead/g
        routing/maxvio/g      routing/overlap/text-vae and the same under routing/layer{i}/...

    and routing/capacity@1/g/random, the rate of uniform random routing for as many tokens (equal in every layer; left
    out where the kinds of a group see different experts). Layers are numbered among the MoE layers, from 0.
    Empty without MoE layers.
    """
    if not counts.shape[0] or not counts.shape[-1]:
        return {}
    member = torch.zeros(len(GROUPS), len(KINDS), dtype=torch.float64, device=counts.device)
    for g, kinds in enumerate(GROUPS.values()):
        member[g, list(kinds)] = 1.0
    present = tokens > 0
    counts_LGE = torch.einsum("gm,lme->lge", member, counts.double())
    visible_GE = torch.einsum("gm,me->ge", member * present, visible.double()) > 0
    names = {"utilisation": utilisation, "active": active, "dead": dead, "maxvio": max_vio}
    table = {f"capacity@{f:g}": capacity_rate(counts_LGE, visible_GE, f) for f in factors}
    table |= {name: function(counts_LGE, visible_GE) for name, function in names.items()}
    shown = [(g, name) for g, name in enumerate(GROUPS) if bool(present[list(GROUPS[name])].any())]
    out = _named(table, shown)
    if bool(present[KINDS.index("text")]) and bool(present[KINDS.index("vae")]):
        shared_L = overlap(counts[:, KINDS.index("text")], counts[:, KINDS.index("vae")])
        out |= {"routing/overlap/text-vae": shared_L.mean()}
        out |= {f"routing/layer{i}/overlap/text-vae": value for i, value in enumerate(shared_L)}
    return out | _baselines(tokens, visible, top_k, factors, shown)


def _named(table: dict[str, Tensor], shown: list[tuple[int, str]]) -> dict[str, Tensor]:
    """Metric -> [L, G] to one entry per name: means over layers first, then the layers."""
    pooled = {metric: value.mean(0) for metric, value in table.items()}
    layers = zip(*(value.unbind() for value in table.values()), strict=True)
    by_layer = {f"routing/layer{i}": dict(zip(table, rows, strict=True)) for i, rows in enumerate(layers)}
    out: dict[str, Tensor] = {}
    for prefix, rows in {"routing": pooled, **by_layer}.items():
        for metric, row in rows.items():
            values = row.unbind()
            out |= {f"{prefix}/{metric}/{name}": values[g] for g, name in shown}
    return out


def _baselines(
    tokens: Tensor, visible: Tensor, top_k: int, factors: Sequence[float], shown: list[tuple[int, str]]
) -> dict[str, Tensor]:
    out = {}
    for _, name in shown:
        kinds = [m for m in GROUPS[name] if tokens[m] > 0]
        if any(not torch.equal(visible[m], visible[kinds[0]]) for m in kinds):
            continue
        num_tokens, num_experts = round(float(tokens[kinds].sum())), int(visible[kinds[0]].sum())
        for f in factors:
            rate = random_capacity_rate(num_tokens, top_k, num_experts, f)
            out[f"routing/capacity@{f:g}/{name}/random"] = torch.tensor(rate, dtype=torch.float64)
    return out
