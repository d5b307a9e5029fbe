"""The receipt of a split: which experts went where, parameters before and after, whether the gates kept their values.

Suffixes: N tokens, D width, C router columns, K of top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symbiotic.convert.profile import router_inputs
from symbiotic.convert.split import LATENT_MODULES, Assignment
from symbiotic.layout import opened
from symbiotic.models.batch import Batch
from symbiotic.models.moe import MoE
from symbiotic.models.routing import route
from symbiotic.models.unified import UnifiedModel


def count_parameters(model: UnifiedModel) -> dict[str, int]:
    """total, and `latent`: the modules that generation adds to every system."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return {
        "total": sum(sizes.values()),
        "latent": sum(n for name, n in sizes.items() if name.startswith(LATENT_MODULES)),
    }


def expert_gates(moe: MoE, x_ND: Tensor, kind_N: Tensor) -> Tensor:
    """[N, E]: each token's gate of each expert of a layer, 0 where not chosen. It sees what its kind does."""
    logits_NC = x_ND @ torch.cat(list(moe.routers.values()), dim=1)
    gates_NK, columns_NK, _ = route(logits_NC, moe.visible_MC[kind_N], moe.cfg, moe.bias)
    return gates_NK.new_zeros(len(x_ND), moe.num_experts).scatter_(1, moe.expert_C[columns_NK], gates_NK)


@torch.no_grad()
def gate_identity(parent: UnifiedModel, child: UnifiedModel, assignment: Assignment, probe: Batch) -> list[dict]:
    """Per MoE layer, on the hidden states of the parent: the share of tokens whose old top-k lies wholly among the
    experts that they still see, and the largest change of a gate of such a token.

    Zero up to rounding where the router renormalises its top-k; elsewhere `factor` is the range of the one factor
    per token by which the gates grew, since masked columns left the softmax. The gate of merged experts is held against
    the sum of those of their parts, and changes: they are chosen together. choice_kept: the share of these tokens whose
    experts are the same as before, and kept_gate_change the largest change among them. It is 1 but for ties, and for
    softmax scores with a selection bias (ERNIE-4.5), which does not grow with the probabilities as columns leave.
    """
    kind_N = probe.kind.reshape(-1)[probe.segment.reshape(-1) >= 0]
    layers, rows = iter(assignment), []
    for old, new, x_ND in zip(parent.blocks, child.blocks, router_inputs(parent, probe), strict=True):
        if not old.moe.pools:  # type: ignore[union-attr]
            continue
        owners = torch.tensor([e for experts in next(layers).values() for e in experts])
        parts = expert_gates(old.moe, x_ND, kind_N)[:, owners]  # type: ignore[arg-type]
        before = parts.unflatten(1, (-1, child.system.merge)).sum(-1)
        after = expert_gates(new.moe, x_ND, kind_N)  # type: ignore[arg-type]
        inside = ((before > 0) & ~child.own_experts[kind_N]).sum(1) == 0
        factor = (after.sum(1) / before.sum(1))[inside]
        change = (after - before * (after.sum(1) / before.sum(1))[:, None])[inside].abs()
        kept = ((before > 0) == (after > 0))[inside].all(1)
        rows.append(
            {
                "tokens_inside": float(inside.float().mean()),
                "max_gate_change": float(change.max()) if inside.any() else 0.0,
                "factor": [float(factor.min()), float(factor.max())] if inside.any() else [1.0, 1.0],
                "choice_kept": float(kept.float().mean()) if inside.any() else 1.0,
                "kept_gate_change": float(change[kept].max()) if kept.any() else 0.0,
            }
        )
    return rows


@torch.no_grad()
def masks_off(parent: UnifiedModel, child: UnifiedModel, probe: Batch) -> dict[str, float] | None:
    """The largest change of a logit on the probe when every kind sees every expert again: that of rounding, where the
    split only moved tensors. None where such a child is not defined (see `layout.opened`)."""
    system = opened(child.system)
    if system is None:
        return None
    with torch.device("meta"):  # the child's own tensors in another layout, none of them twice
        whole = UnifiedModel(child.cfg, system, child.latents, child.codebook)
    state = child.state_dict()
    whole.load_state_dict({name: state[name] for name in whole.state_dict()}, assign=True)
    change = (whole(probe).logits - parent(probe).logits).abs()
    return {"max_logit_change": float(change.max()) if change.numel() else 0.0}


def receipt(parent: UnifiedModel, child: UnifiedModel, assignment: Assignment, probe: Batch) -> dict[str, Any]:
    """A plain dictionary for `receipt.json`. `added`: by the split itself (copies), the latent modules apart."""
    before, after = count_parameters(parent), count_parameters(child)
    return {
        "experts": assignment,
        "parameters": {
            "before": before["total"],
            "after": after["total"] - after["latent"],
            "added": after["total"] - after["latent"] - before["total"],
            "latent_modules": after["latent"],
        },
        "gate_identity": gate_identity(parent, child, assignment, probe),
        "masks_off": masks_off(parent, child, probe),
    }
