"""Split a parent's experts into the pools of a system, without adding a parameter (Symbiotic-MoE, steps 2 to 4).

An expert keeps its weights wherever it lands, and a pool's router is the slice of the parent's columns. Shared
experts and streams that a system has more than once start as copies. Only the latent modules are new, and what a task
router and a learned mix need. Systems that merge experts (`merge.py`) pair them in the order of their use.
Suffixes: L MoE layers, M kinds, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from symbiotic.convert.merge import merged
from symbiotic.layout import generates, kinds_of, pool_sizes, router_pools, visible_pools
from symbiotic.models.transformer import initial
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS, PARENT, Init, Model, System

Assignment = list[dict[str, list[int]]]
"""Per MoE layer: pool -> the parent's experts that it stores, in ascending order; where experts are merged, those of
one expert next to each other."""

LATENT_MODULES = ("latent_in.", "latent_grid.", "time_in.", "latent_head.")
"""Name prefixes of what generation adds to every system."""

FRESH = 1_000_033  # added to the seed of what is drawn anew at the split

UNDERSTOOD = ("text", "vit")
"""The kinds whose use of the experts is profiled."""


def usage(counts_ME: Tensor) -> dict[str, Tensor]:
    """Kind -> share of its assignments that each expert got, [E]; zeros where the kind had no token."""
    rows = {kind: counts_ME[KINDS.index(kind)] for kind in UNDERSTOOD}
    return {kind: row / row.sum().clamp(min=1.0) for kind, row in rows.items()}


def assign_layer(
    counts_ME: Tensor, sizes: Mapping[str, int], seen_by: Mapping[str, tuple[str, ...]], merge: int = 1
) -> dict:
    """Which experts go where in one layer, by profile.

    Ranked by `freq_text/sum(freq_text) + freq_vit/sum(freq_vit)`, the least used experts go to the pools that only
    generation sees, and the rest to the others; where two pools serve different kinds (tripartite) an expert goes where
    it was used relatively more. Ties keep the expert's number. seen_by: pool -> kinds. sizes: in experts of the parent.
    merge: so many of them, neighbours in the rank, become one.
    """
    share = usage(counts_ME)
    rank = sum(share.values())
    left = sorted(range(counts_ME.shape[1]), key=lambda e: -float(rank[e]))  # type: ignore[index]
    chosen: dict[str, list[int]] = {}
    for pool in (p for p in sizes if generates(seen_by[p])):
        chosen[pool], left = left[len(left) - sizes[pool] :], left[: len(left) - sizes[pool]]
    pools = [p for p in sizes if p not in chosen]
    for i, pool in enumerate(pools):
        rivals = pools[i + 1 :]
        margin = {e: _margin(share, seen_by[pool], [seen_by[r] for r in rivals], e) for e in left}
        left = sorted(left, key=lambda e: -margin[e])  # stable: equal margins stay in the order of the rank
        chosen[pool], left = left[: sizes[pool]], left[sizes[pool] :]
    if merge > 1:
        return {pool: sorted(chosen[pool], key=lambda e: (-float(rank[e]), e)) for pool in sizes}  # type: ignore[index]
    return {pool: sorted(chosen[pool]) for pool in sizes}


def _margin(share: Mapping[str, Tensor], mine: tuple[str, ...], rivals: list[tuple[str, ...]], e: int) -> float:
    own = sum(float(share[k][e]) for k in UNDERSTOOD if k in mine)
    others = {k for kinds in rivals for k in kinds}
    return own - sum(float(share[k][e]) for k in UNDERSTOOD if k in others)


def assign(counts_LME: Tensor, model: Model, system: System, method: str, seed: int) -> Assignment:
    """The pools of every MoE layer: `profiled`, `random` (seeded, per layer) or `contiguous`."""
    sizes = {pool: size * system.merge for pool, size in pool_sizes(model, system).items()}
    seen = visible_pools(system)
    seen_by = {p: tuple(k for k in KINDS if p in seen[k]) for p in sizes}
    if method == "profiled":
        return [assign_layer(counts_ME, sizes, seen_by, system.merge) for counts_ME in counts_LME]
    generator = torch.Generator().manual_seed(seed)
    assignment = []
    for _ in range(len(counts_LME)):
        order = torch.randperm(model.num_experts, generator=generator) if method == "random" else None
        experts = list(range(model.num_experts)) if order is None else order.tolist()
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        assignment.append({p: sorted(experts[a:b]) for p, a, b in zip(sizes, ends, ends[1:], strict=False)})
    return assignment


def split_state(
    parent: Mapping[str, Tensor], child: UnifiedModel, assignment: Assignment, seed: int, init: Init | None = None
) -> dict[str, Tensor]:
    """The child's state: slices and copies of the parent's tensors; latent modules, task routers and mixes fresh from
    (seed, name), and so are what `init` wants fresh: routers, or the experts of pools that only generation sees. Biases
    of columns that the parent lacks are zero."""
    init = init or Init()
    cfg, layers = child.cfg, iter(range(child.cfg.num_layers))
    moe_layers = [i for i in layers if i not in cfg.dense_layers]
    experts = {layer: assignment[n] for n, layer in enumerate(moe_layers)} if assignment else {}
    pools, state = router_pools(child.system), {}
    for name, empty in child.state_dict().items():
        if is_fresh(name, child.system, init):  # a parent's parameter of the same name started from (seed, name)
            state[name] = initial(name, empty, seed + FRESH, cfg.init_std, cfg.num_layers)
        elif (name.startswith(LATENT_MODULES) or is_new(name)) and name not in parent:
            state[name] = initial(name, empty, seed, cfg.init_std, cfg.num_layers)
        elif name.endswith(".moe.bias"):
            layer = int(name.split(".")[1])
            order = [expert for pool in pools.values() for expert in experts[layer][pool]]
            bias = parent[name][order].clone() if name in parent else empty.new_zeros(len(order))
            state[name] = merged(name, bias, child.system.merge)
        elif ".moe.pools." in name or ".moe.routers." in name:
            state[name] = merged(name, _slice(name, parent, pools, experts), child.system.merge)
        else:
            state[name] = parent[parent_name(name, child.system)].clone()
    return state


def is_fresh(name: str, system: System, init: Init) -> bool:
    """Whether `init` wants this parameter of the child drawn anew instead of inherited."""
    parts = name.split(".moe.")[-1].split(".")
    if parts[0] == "routers":
        return init.router == "fresh"
    generation = parts[0] == "pools" and generates(kinds_of(system, f"pools.{parts[1]}"))
    return generation and init.gen_experts == "random"


def is_new(name: str) -> bool:
    """Whether no parent has a parameter of this kind: task routers and mixes."""
    return ".moe.task_router." in name or name.endswith(".moe.mix")


def _slice(name: str, parent: Mapping[str, Tensor], pools: Mapping[str, str], experts: Mapping) -> Tensor:
    """Rows of a stacked expert weight, or columns of the router."""
    head, tail = name.split(".moe.")
    layer, (group, owner, *weight) = int(head.split(".")[1]), tail.split(".")
    tensor = parent[".".join([head, "moe", group, PARENT, *weight])]
    pool = owner if group == "pools" else pools[owner]
    index = torch.tensor(experts[layer][pool])
    return tensor[index].clone() if group == "pools" else tensor[:, index].clone()


def parent_name(name: str, system: System) -> str:
    """The parent's parameter that a copy (shared expert, stream) starts from."""
    streams = tuple(system.streams)
    copies = {"shared": tuple(system.shared), "attention": streams, "moe_norm": streams}
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if parts[i + 1] in copies.get(part, ()):
            parts[i + 1] = PARENT
    if parts[0] == "norm":
        parts[1] = PARENT
    return ".".join(parts)
