"""Low-rank updates beside weights: `x W + (alpha / r) x A B` (LoRA, arXiv 2106.09685, section 4.1).

A is fresh from (seed, name) and B is 0, so at the start the outputs are those without LoRA, bit for bit. The library
peft serves stacked experts by building the whole update of all of them in every forward, and renames the weights
that it wraps: roles, receipts and checkpoints go by these names. Here the update stays two thin products, expert by
expert where the weight is stacked, and its parameters lie beside their weight: `….q.weight` and `….lora.q.{a,b}`,
`….pools.und.w_in` and `….pools.und.lora.w_in.{a,b}`.
Suffixes: D inputs, F outputs of a weight, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from symbiotic.layout import adapted, lora_place
from symbiotic.models.expert_parallel import local
from symbiotic.models.places import product
from symbiotic.schema import Lora

Initial = Callable[[str, Tensor], Tensor]
"""Name and empty parameter -> its fresh value."""


class LowRank(nn.Module):
    """`scale x A B`, A [D, r] and B [r, F]; of stacked experts [E, D, r] and [E, r, F]. Created empty."""

    def __init__(self, shape: tuple[int, ...], lora: Lora) -> None:
        super().__init__()
        *experts, inputs, outputs = shape
        self.scale = lora.alpha / lora.rank
        self.a = nn.Parameter(torch.empty(*experts, inputs, lora.rank))
        self.b = nn.Parameter(torch.empty(*experts, lora.rank, outputs))

    def forward(self, x_ND: Tensor, weight_scale_N1: Tensor | None = None, ends_E: Tensor | None = None) -> Tensor:
        """[N, F]; the arguments are those of `places.product`."""
        narrow_Nr = product(x_ND, local(self.a), weight_scale_N1, ends_E)
        return self.scale * product(narrow_Nr, local(self.b), weight_scale_N1, ends_E)


class Adaptable(nn.Module):
    """A module whose weights may get a `LowRank` each; without any it computes what it always did."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.ModuleDict()

    def updated(self, leaf: str, y_NF: Tensor, x_ND: Tensor, *rows: Tensor | None) -> Tensor:
        """`y`, the product of x with the weight `leaf`, and its update where it has one."""
        return y_NF + self.lora[leaf](x_ND, *rows) if leaf in self.lora else y_NF

    def times(self, leaf: str, x_ND: Tensor, *rows: Tensor | None) -> Tensor:
        """The product with the parameter `leaf`, update included; rows as in `places.product`."""
        return self.updated(leaf, product(x_ND, local(getattr(self, leaf)), *rows), x_ND, *rows)


def attach(model: nn.Module, lora: Lora, initial: Initial) -> None:
    """Give every targeted weight of a model its update; nothing at rank 0."""
    parameters = dict(model.named_parameters())
    for name in adapted(list(parameters), lora):
        head, leaf = lora_place(name)
        weight = parameters[name].mT if name.endswith(".weight") else parameters[name]
        update = LowRank(tuple(weight.shape), lora).to(weight.device, weight.dtype)
        for side, parameter in update.named_parameters():
            parameter.data.copy_(initial(f"{head}.lora.{leaf}.{side}", parameter))
        owner = model.get_submodule(head)
        assert isinstance(owner, Adaptable)
        owner.lora[leaf] = update


def is_lora(name: str) -> bool:
    """Whether a parameter is part of a low-rank update."""
    return ".lora." in name


def merge(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """A state with every update added to its weight, `W + (alpha / r) A B`, computed in double precision."""
    merged = {name: value for name, value in state.items() if not is_lora(name)}
    for name in merged:
        head, leaf = lora_place(name)
        if f"{head}.lora.{leaf}.a" in state:
            a, b = (state[f"{head}.lora.{leaf}.{side}"].double() for side in "ab")
            update = lora.alpha / lora.rank * (a @ b)
            weight = merged[name].double() + (update.mT if name.endswith(".weight") else update)
            merged[name] = weight.to(merged[name].dtype)
    return merged
