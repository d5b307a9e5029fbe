"""What an arm costs: parameters by component, operations per token, tokens, steps, seconds; how arms differ in it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from symbiotic.models.unified import model_of
from symbiotic.schema import KINDS, Config
from symbiotic.studies.flops import Flops, count_flops
from symbiotic.studies.inventory import classify, inventory
from symbiotic.studies.runs_of import Run
from symbiotic.training.phases import active_phases
from symbiotic.training.roles import assign_roles, role_lr

FAMILIES = (
    *("embeddings", "latents in, flow time", "attention and norms", "routers", "routed experts", "shared expert"),
    *("dense FFN", "heads: words", "heads: latents", "task routers and mixes", "low-rank updates", "vision tower"),
)
"""Components of any system, whatever its pools and streams are called."""


@dataclass(frozen=True)
class Part:
    """A component. active: kind -> parameters that one token of it uses. trainable: those with a rate above 0 (the
    latent modules of a run without generation too, which get no gradient)."""

    name: str
    total: int
    trainable: int
    active: Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """
    Args:
        row_tokens: length of a row, at which attention is counted.
        tokens: task -> (least, most) seen in a run, over seeds; empty for runs that did not count.
        seconds: mean time of joint training. split: what the receipt says of the parameters (`before`, `after`, both
            without latent modules; `added` by the split itself; `latent_modules`), where all runs agree.
    """

    parts: tuple[Part, ...]
    flops: Flops
    row_tokens: int
    steps: int
    tokens: Mapping[str, tuple[int, int]]
    seconds: float | None
    split: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts)

    @property
    def active(self) -> dict[str, float]:
        return {kind: sum(part.active[kind] for part in self.parts) for kind in KINDS}


def budget(config: Config, runs: Sequence[Run]) -> Budget:
    """Of an arm. config: that of its runs, seed aside."""
    with torch.device("meta"):
        model = model_of(config).adapt(config.lora, config.seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    seconds = [run.summary.get("seconds", {}).get("joint") for run in runs]
    return Budget(
        parts=tuple(parts(shapes, config)),
        flops=count_flops(shapes, config),
        row_tokens=config.data.row_tokens,
        steps=config.phases.steps,
        tokens=token_ranges([run.summary.get("tokens") for run in runs]),
        seconds=statistics.fmean(known) if (known := [s for s in seconds if s is not None]) else None,
        split=receipt_of(runs),
    )


def parts(shapes: Mapping[str, tuple[int, ...]], config: Config) -> list[Part]:
    """Components in the order in which a token meets them."""
    roles, trained = assign_roles(shapes, config.rates.roles), trained_roles(config)
    trainable: dict[str, int] = {}
    for name, shape in shapes.items():
        label = classify(name, shape, config.model, config.system)[0]
        numbers = torch.Size(shape).numel() if roles[name] in trained else 0
        trainable[label] = trainable.get(label, 0) + numbers
    found = inventory(shapes, config.model, config.system)
    return [Part(c.name, c.total, trainable[c.name], dict(c.active)) for c in found]


def trained_roles(config: Config) -> set[str]:
    """Roles whose rate is above 0 in some phase that does not freeze them."""
    rates, phases = config.rates, active_phases(config.phases)
    return {
        role
        for role in rates.roles
        if role_lr(role, rates.lr, rates.by_role) > 0
        and any(role not in phase.frozen and phase.rate.get(role, 1.0) > 0 for phase in phases)
    }


def token_ranges(counted: Sequence[Mapping[str, int] | None]) -> dict[str, tuple[int, int]]:
    known = [tokens for tokens in counted if tokens]
    if len(known) < len(counted):
        return {}
    tasks = dict.fromkeys(task for tokens in known for task in tokens)
    values = {task: [int(tokens.get(task, 0)) for tokens in known] for task in tasks}
    return {task: (min(found), max(found)) for task, found in values.items()}


def receipt_of(runs: Sequence[Run]) -> dict[str, int]:
    """The parameters in the receipts of an arm's runs; empty where there is none, or they do not agree."""
    found = [run.parameters for run in runs]
    return (found[0] or {}) if found and all(one == found[0] for one in found) else {}


def overhead(one: Budget, other: Budget) -> dict[str, int]:
    """Component of any system -> parameters that `one` has more than `other`; those that neither has are left out."""
    counts = [{family: in_family(made, family) for family in FAMILIES} for made in (one, other)]
    return {family: counts[0][family] - counts[1][family] for family in FAMILIES if any(c[family] for c in counts)}


def in_family(made: Budget, family: str) -> int:
    return sum(part.total for part in made.parts if part.name.startswith(family))
