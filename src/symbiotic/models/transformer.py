"""One transformer block for every system, and the stack of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from symbiotic.layout import shared_scopes
from symbiotic.models.attention import Attention, by_stream, rope_angles
from symbiotic.models.fused import RMSNorm
from symbiotic.models.moe import LayerStats, MoE
from symbiotic.models.places import Places
from symbiotic.schema import KINDS, Model, System


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + moe(norm(x))`."""

    def __init__(self, model: Model, system: System, layer: int) -> None:
        super().__init__()
        self.system = system
        groups = [*system.streams.values(), *shared_scopes(system).values()]
        self.gathered = tuple(kinds for kinds in groups if set(kinds) != set(KINDS))  # streams, scopes of some tokens
        self.attention = Attention(model, system)
        self.moe_norm = nn.ModuleDict({s: RMSNorm(model.width, eps=model.norm_eps) for s in system.streams})
        self.moe = MoE(model, system, dense=model.dense_hidden if layer in model.dense_layers else 0)

    def forward(self, x_ND: Tensor, places: Places, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, LayerStats | None]:
        x_ND, normed_ND = self.before_moe(x_ND, places, angles)
        y_ND, stats = self.moe(normed_ND, places)
        return x_ND + y_ND, stats

    def before_moe(self, x_ND: Tensor, places: Places, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm: what the routers and experts see."""
        x_ND = x_ND + self.attention(x_ND, places, angles)
        return x_ND, by_stream(dict(self.moe_norm.items()), self.system, x_ND, places)


def run_blocks(
    blocks: nn.ModuleList, x_ND: Tensor, position_N: Tensor, places: Places, model: Model, recompute: bool = False
) -> tuple[Tensor, list[LayerStats]]:
    """The stack; returns the last hidden states and what each MoE layer counted (dense layers count nothing).

    recompute: keep no activations of a block but its input, and compute it again in the backward pass. What was counted
    is returned by the first pass only.
    """
    places.find(blocks[0].gathered)  # type: ignore[arg-type]
    angles = rope_angles(position_N, model.attention.head_dim, model.attention.rope_theta)
    layers: list[LayerStats] = []
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x_ND, stats = checkpoint(block, x_ND, places, angles, use_reentrant=False, preserve_rng_state=False)
        else:
            x_ND, stats = block(x_ND, places, angles)
        if stats is not None:
            layers.append(stats)
    return x_ND, layers


def initial(name: str, parameter: Tensor, seed: int, std: float, num_layers: int) -> Tensor:
    """A fresh value, a function of (seed, name) only: arms that share a parameter start from the same one.

    Norm weights are 1; biases, mixes (so alpha = 1/2) and the B of low-rank updates 0; everything else Normal(0, std),
    what writes to the residual stream smaller by sqrt(2 * layers) (GPT-2).
    """
    leaf = name.rsplit(".", 1)[-1]
    if "norm" in name and leaf == "weight":
        return torch.ones_like(parameter)
    if leaf in ("bias", "mix", "b"):
        return torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(_stable_hash(f"{seed}/{name}"))
    writes = name.startswith("blocks.") and (name.endswith(".o.weight") or leaf == "w_out")
    value = torch.randn(parameter.shape, generator=generator) * std / ((2 * num_layers) ** 0.5 if writes else 1.0)
    return value.to(parameter)


def _stable_hash(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
