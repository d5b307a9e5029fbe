"""Models with a given shield, batches that tell the modes apart, and the gradients that the tests look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factory import level, load_system, random_batch, tiny_model
from symbiotic.data.packing import GenImage, ReadImage, build_sample, collate
from symbiotic.models.batch import Batch
from symbiotic.models.unified import Output, UnifiedModel
from symbiotic.objectives.flow import noised
from symbiotic.objectives.total import loss_terms
from symbiotic.schema import Objective, Shield

Gradients = dict[str, Tensor]


def shielded(
    name: str = "symbiotic",
    mode: str = "output",
    target: str = "shared",
    kinds: Sequence[str] = ("vae",),
    seed: int = 0,
    **changes: Any,
) -> UnifiedModel:
    """A tiny model of a shipped system whose shield is replaced by this one."""
    model = tiny_model(**changes)
    shield = Shield(mode, {target: tuple(kinds)})  # type: ignore[arg-type]
    return UnifiedModel(model, dataclasses.replace(load_system(name, model), shield=shield)).initialise(seed)


def edits(count: int = 4, seed: int = 0) -> Batch:
    """Samples without a word: an image that is read, then one that is generated."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 2, 8, 12, 3), dtype=np.uint8)
    samples = [build_sample(f"edit-{i}", "t2i", [ReadImage(a), GenImage(b)]) for i, (a, b) in enumerate(images)]
    noises = [rng.standard_normal(sample.latents.shape, dtype=np.float32) for sample in samples]
    return collate(samples, 48, times=list(rng.uniform(0.1, 0.9, count)), noises=noises)


def latents_only(count: int = 4, seed: int = 0) -> Batch:
    return random_batch(count, ("latents",), seed)


def with_norms(batch: Batch, ce: float = 40.0, flow: float = 20.0) -> Batch:
    """The batch with other normalisers of its losses: those of a step of several micro-batches."""
    return dataclasses.replace(batch, ce_norm=torch.tensor(ce), flow_norm=torch.tensor(flow))


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches as one; the normalisers are those of the first."""
    norms = ("ce_norm", "flow_norm")
    names = [f.name for f in dataclasses.fields(Batch) if f.name not in norms]
    fields = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return dataclasses.replace(batches[0], **fields)


def forward(model: Any, batch: Batch, value: float | Tensor | None = 1.0) -> Output:
    """The training forward at a level of the shield; None: no shield at all."""
    return model(noised(batch), shield=level(value) if isinstance(value, float) else value)


def weighed(model: UnifiedModel, out: Output, batch: Batch, weights: Mapping[str, float]) -> Tensor:
    """The loss with these weights of its terms; the others are there with weight 0, as in a run."""
    terms = loss_terms(model, out, batch, Objective())
    return torch.stack([weights.get(name, 0.0) * term for name, term in terms.items()]).sum()


GENERATION, UNDERSTANDING = {"flow": 1.0}, {"ce": 1.0}
WHOLE = {"ce": 1.0, "flow": 1.0, "balance": 0.01, "z": 0.001}


def gradients(
    model: UnifiedModel, batch: Batch, value: float | Tensor | None = 1.0, weights: Mapping[str, float] = GENERATION
) -> Gradients:
    """Gradient of every parameter; every parameter must have one."""
    model.zero_grad(set_to_none=True)
    weighed(model, forward(model, batch, value), batch, weights).backward()
    return collected(model)


def collected(model: UnifiedModel) -> Gradients:
    """The gradients that the model holds, by name; a parameter without one fails."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_layer(found: Gradients, target: str = "shared") -> list[float]:
    """Largest absolute gradient on the parameters of a shield target (`shared`, `pools.NAME`), layer by layer."""
    layers = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks."))
    return [
        max(float(g.abs().max()) for name, g in found.items() if name.startswith(f"blocks.{i}.moe.{target}."))
        for i in range(layers)
    ]


def same_bits(one: Gradients, other: Gradients) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def close(one: Gradients, other: Gradients, rtol: float = 1e-6) -> None:
    """Every gradient equal to `rtol` of its tensor's largest element."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(other[name], value, rtol=0, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")
