"""Floating-point operations that one token costs, counted from the shapes of the parameters.

    forward of one token = 2 x (parameters of matrix products that the token uses)
                         + layers x 4 x row length x heads x head width
    training             = 3 x forward (the backward pass costs two forwards), 4 x with `recompute`

A product of a token with a matrix of n numbers takes n multiplications and n additions. The second term is attention:
scores and their sum over the values, at the row length, as masked places are computed too. Routers count the columns
that the token may use, routed experts its top-k. Norms, softmax, rotations, activations and lookups are left out, as is
padding. A word's token is taken to predict the next one (the head is computed for those that have a target only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from symbiotic.models.unified import model_of
from symbiotic.schema import KINDS, Config, Model, System
from symbiotic.studies.inventory import LOOKUPS, classify, count

BACKWARD = 2


@dataclass(frozen=True)
class Flops:
    """Of one token. products: kind -> matrix products, forward. attention: forward. passes: forwards that a training
    step is worth."""

    products: Mapping[str, float]
    attention: float
    passes: int = 1 + BACKWARD

    @property
    def forward(self) -> dict[str, float]:
        return {kind: found + self.attention for kind, found in self.products.items()}

    @property
    def training(self) -> dict[str, float]:
        return {kind: self.passes * found for kind, found in self.forward.items()}


def count_flops(shapes: Mapping[str, tuple[int, ...]], config: Config) -> Flops:
    """shapes: parameter name -> shape."""
    model, system = config.model, config.system
    products = dict.fromkeys(KINDS, 0.0)
    for name, shape in shapes.items():
        for kind, used in multiplied(name, shape, model, system).items():
            products[kind] += 2 * used
    attention = attention_flops(model, config.data.row_tokens)
    return Flops(products, attention, 1 + BACKWARD + config.recompute)


def training_flops(config: Config) -> dict[str, float]:
    """Kind -> operations of one of its tokens in a training step; what is computed again is not counted (MFU)."""
    with torch.device("meta"):
        model = model_of(config).adapt(config.lora, config.seed)
    found = count_flops({name: tuple(p.shape) for name, p in model.named_parameters()}, config)
    return {kind: (1 + BACKWARD) * count for kind, count in found.forward.items()}


def attention_flops(model: Model, row_tokens: int) -> float:
    """Of one token in all layers, forward."""
    cfg = model.attention
    return float(model.num_layers * 4 * row_tokens * cfg.num_heads * cfg.head_dim)


def multiplied(name: str, shape: tuple[int, ...], model: Model, system: System) -> dict[str, float]:
    """Kind -> numbers of a parameter that a token of it is multiplied with: none of a norm, a bias or a lookup."""
    if len(shape) < 2:
        return {}
    if name == "embed.weight" and model.tied_head:
        return dict.fromkeys(("text", "prompt"), float(count(shape)))
    return {} if name.startswith(LOOKUPS) else classify(name, shape, model, system)[1]
