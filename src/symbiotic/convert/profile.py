"""Profile a parent: how often text and read patches choose each expert (Symbiotic-MoE, step 1).

Suffixes: L MoE layers, M kinds, E routed experts, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from symbiotic.models.attention import rope_angles
from symbiotic.models.batch import Batch
from symbiotic.models.places import Places
from symbiotic.models.unified import UnifiedModel


@torch.no_grad()
def expert_counts(parent: UnifiedModel, batches: Iterable[Batch]) -> Tensor:
    """[L, M, E]: assignments of the tokens of each kind to each expert over all batches."""
    return torch.stack([parent(batch).routing.counts for batch in batches]).sum(0)


@torch.no_grad()
def router_inputs(model: UnifiedModel, batch: Batch) -> list[Tensor]:
    """What the routers of each layer see, padding left out: one [N, D] a layer."""
    places, cfg = Places(batch, None), model.cfg
    angles = rope_angles(batch.position.reshape(-1), cfg.attention.head_dim, cfg.attention.rope_theta)
    x_ND, seen = model.embedding(batch), []
    for block in model.blocks:
        x_ND, normed_ND = block.before_moe(x_ND, places, angles)  # type: ignore[operator]
        x_ND = x_ND + block.moe(normed_ND, places)[0]  # type: ignore[operator]
        seen.append(normed_ND[places.valid_N])
    return seen
