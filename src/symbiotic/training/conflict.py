"""Do the two tasks pull the same parameters in opposite directions, and how much gets past the shield?

Pure functions on gradients; a gradient is a mapping from the name of a parameter to its tensor.
Suffixes: P parameters (tensors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from symbiotic.layout import shield_kinds
from symbiotic.schema import Model, System

Gradient = dict[str, Tensor]

PLACE = re.compile(r"blocks\.(?P<block>\d+)\.moe\.(?P<component>\w+\.\w+)\.")


def task_gradients(losses: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Gradient]:
    """Task -> gradient of its loss; zeros where it does not reach a parameter. `.grad` stays as it is.

    One backward pass a task through one graph, which the last of them frees.
    """
    tensors, found = list(parameters.values()), dict[str, Gradient]()
    for task, loss in losses.items():
        more = len(found) < len(losses) - 1
        grads = torch.autograd.grad(loss, tensors, retain_graph=more, materialize_grads=True)
        found[task] = dict(zip(parameters, grads, strict=True))
    return found


def squares(gradient: Gradient, names: Iterable[str]) -> Tensor:
    """[P] squared norm of each tensor, float64: small gradients must not vanish in it."""
    return torch.stack([gradient[name].double().square().sum() for name in names])


def products(first: Gradient, second: Gradient) -> Tensor:
    """[3, P] float64, tensor by tensor: |a|^2, |b|^2 and a.b."""
    columns = []
    for name in first:
        a, b = first[name].double().flatten(), second[name].double().flatten()
        columns.append(torch.stack([a @ a, b @ b, a @ b]))
    return torch.stack(columns, dim=1)


def role_conflicts(products_3P: Sequence[Sequence[float]], roles: Sequence[str]) -> dict[str, float]:
    """How the gradients of understanding and generation compare on each role, from their `products`.

    conflict/ROLE/und, gen: norms. ratio: gen / und. cosine: of the role's gradients as two vectors. opposed: share of
    the role's tensors with a negative dot product, among those that both tasks reach. The last three are left out where
    one of the tasks does not reach the role. roles: of each of the P parameters.
    """
    metrics: dict[str, float] = {}
    for role in dict.fromkeys(roles):
        tensors = [row for row, own in zip(zip(*products_3P, strict=True), roles, strict=True) if own == role]
        und, gen = (math.sqrt(math.fsum(row[i] for row in tensors)) for i in (0, 1))
        metrics |= {f"conflict/{role}/und": und, f"conflict/{role}/gen": gen}
        both = [dot for first, second, dot in tensors if first > 0 and second > 0]
        if und > 0 and gen > 0:
            metrics[f"conflict/{role}/ratio"] = gen / und
            metrics[f"conflict/{role}/cosine"] = math.fsum(row[2] for row in tensors) / (und * gen)
        if both:
            metrics[f"conflict/{role}/opposed"] = sum(dot < 0 for dot in both) / len(both)
    return metrics


def shielded_layers(names: Iterable[str], model: Model, system: System) -> dict[str, int]:
    """Parameter of a shielded component -> number of its MoE layer, from 0, as in the names of the routing metrics.

    Empty where the system shields nothing.
    """
    components = shield_kinds(system)
    layers = [layer for layer in range(model.num_layers) if layer not in model.dense_layers]
    matches = {name: PLACE.match(name) for name in names}
    return {n: layers.index(int(m["block"])) for n, m in matches.items() if m and m["component"] in components}


def leaks(shielded_P: Sequence[float], free_P: Sequence[float], layers: Sequence[int]) -> dict[str, float]:
    """Norm of the generation gradient on the shielded parameters, as a share of what it would be without the shield.

    leak/all: over all of them; leak/layer{i}: over those of an MoE layer. From squared norms tensor by tensor, with and
    without the shield. Left out where nothing would arrive without it either.
    """
    found = {}
    for name, wanted in {"all": set(layers), **{f"layer{i}": {i} for i in sorted(set(layers))}}.items():
        rows = [row for row, layer in zip(zip(shielded_P, free_P, strict=True), layers, strict=True) if layer in wanted]
        arrived, free = (math.fsum(row[i] for row in rows) for i in (0, 1))
        if free > 0:
            found[f"leak/{name}"] = math.sqrt(arrived / free)
    return found
