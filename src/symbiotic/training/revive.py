"""Dead experts get a second life: each becomes a copy of a busy expert of its pool, optimiser state included.

Ours. Shapes: D width, E experts of a pool, L MoE layers, M kinds. Copies of an expert compute the same, so only the
router can part them: the columns of an expert and its copies are moved apart, symmetrically.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from symbiotic.layout import router_pools
from symbiotic.models.moe import MoE
from symbiotic.schema import System

Donors = dict[int, int]
"""Dead expert -> the expert that it becomes a copy of, both numbered within their pool."""


def choose_donors(load_E: Tensor, share: float) -> Donors:
    """Who copies whom in one pool. load_E: [E] assignments, by all kinds that see the pool.

    Dead is an expert with less than `share` of the mean load. The first dead expert copies the busiest; from then on
    these two are taken to share its load, so that several dead experts do not all copy the same one. Nothing is dead
    in a pool without a token.
    """
    load = load_E.double().tolist()
    bound = share * sum(load) / len(load)
    copies = {expert: 1 for expert, n in enumerate(load) if n >= bound}
    donors: Donors = {}
    for expert, n in enumerate(load):
        if n < bound:
            donor = max(copies, key=lambda e: load[e] / copies[e])
            donors[expert] = donor
            copies[donor] += 1
    return donors


def pool_loads(layer: MoE, counts_ME: Tensor) -> dict[str, Tensor]:
    """Pool -> [E] assignments to its experts by tokens of all kinds, in one layer."""
    sizes = [len(pool.w_in) for pool in layer.pools.values()]  # type: ignore[arg-type]
    return dict(zip(layer.pools, counts_ME.sum(0).split(sizes), strict=True))


@torch.no_grad()
def revive_experts(
    layer: MoE,
    system: System,
    pool: str,
    donors: Donors,
    optimizers: Iterable[Optimizer],
    seed: Sequence[int],
    spread: float = 0.5,
) -> None:
    """Make the dead experts of one pool copies of their donors, in place; the same bits for the same arguments.

    Copied: the rows of the stacked weights; the columns of every router that scores the pool, and their biases; and of
    all of these the optimiser's state (Adam's both moments). Then the router columns of a donor and its copies are
    parted (`part`). The optimiser's count of steps is one for the whole tensor and stays.
    seed: non-negative numbers that name this revival, e.g. (seed, step, layer).
    """
    optimizers = list(optimizers)
    experts = layer.pools[pool]
    for parameter in experts.parameters():
        copy_slices(parameter, donors, 0, optimizers)
    first = 0
    for number, (name, router) in enumerate(layer.routers.items()):
        if router_pools(system)[name] == pool:
            copy_slices(router, donors, 1, optimizers)
            part(router, donors, np.random.default_rng([*seed, number]), spread)
            if layer.bias is not None:
                for dead, donor in donors.items():
                    layer.bias[first + dead] = layer.bias[first + donor]
        first += router.shape[1]


def copy_slices(parameter: Tensor, donors: Donors, dim: int, optimizers: Iterable[Optimizer]) -> None:
    """Slice `donor` of dimension `dim` to slice `dead`, in the parameter and in every state tensor of its shape."""
    tensors = [parameter]
    for optimizer in optimizers:
        state: Mapping[str, object] = optimizer.state.get(parameter, {})
        tensors += [t for t in state.values() if isinstance(t, Tensor) and t.shape == parameter.shape]
    for tensor in tensors:
        to, come_from = (torch.tensor(list(e), device=tensor.device) for e in (donors, donors.values()))
        tensor.index_copy_(dim, to, tensor.index_select(dim, come_from))


def part(router_DE: Tensor, donors: Donors, rng: np.random.Generator, spread: float) -> None:
    """Move the equal columns w of every donor and its copies apart: `w + d_i`.

    The d_i add up to 0 (two columns: +d and -d), so the family as a whole is chosen about as readily as before; they
    are orthogonal to w, because what draws all tokens to a collapsed expert is mostly along its column, and a part of d
    along it would send all of them to one copy. Their mean length is `spread` x |w|.
    """
    for donor in dict.fromkeys(donors.values()):
        family = [donor, *(dead for dead, d in donors.items() if d == donor)]
        w_D = router_DE[:, donor].double().cpu()
        d_DF = torch.from_numpy(rng.standard_normal((len(w_D), len(family))))
        d_DF -= d_DF.mean(1, keepdim=True)
        d_DF -= torch.outer(w_D, w_D @ d_DF) / w_D.square().sum().clamp(min=1e-30)
        d_DF *= spread * w_D.norm() / d_DF.norm(dim=0).mean()
        router_DE[:, family] = (w_D[:, None] + d_DF).to(router_DE)


def not_revivable(layers: Iterable[MoE], optimizers: Iterable[Optimizer]) -> str | None:
    """Why experts cannot be copied here, or None: rows of one tensor have to lie whole on every rank."""
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        for name, parameter in [*layer.pools.named_parameters(), *layer.routers.items()]:
            if isinstance(parameter, DTensor):
                return f"{name} is sharded over ranks"
            if id(parameter) not in owned:
                return f"the optimiser holds {name} in another form"
    return None
