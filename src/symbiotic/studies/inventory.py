"""How many parameters each component has, and how many of them one token uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from symbiotic.layout import experts_seen, kinds_of, router_of
from symbiotic.schema import KINDS, Model, System

SHOWN_KINDS = {"text": "a word", "vit": "a read patch", "vae": "a latent"}
"""Kinds of the table and what one token of each is called."""

LOOKUPS = ("embed.weight", "vit_grid.", "latent_grid.")  # tables of which a token takes one row
INPUTS = {"embed": ("text", "prompt"), "vit_in": ("vit",), "vit_grid": ("vit",)}
ORDER = (
    "vision tower",
    "embeddings",
    "latents in",
    "attention",
    "routers",
    "task routers",
    "routed",
    "shared",
    "dense",
    "low-rank",
    "heads",
)
LATENTS = ("latent_in", "latent_grid", "time_in", "latent_head")


@dataclass
class Component:
    """total: parameters. active: kind -> parameters that one token of it uses (a mean where its top-k may fall into
    several pools)."""

    name: str
    total: int = 0
    active: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))


def inventory(shapes: Mapping[str, tuple[int, ...]], model: Model, system: System) -> list[Component]:
    """Components in the order in which a token meets them; every parameter is in exactly one.

    shapes: parameter name -> shape, as `{n: tuple(p.shape) for n, p in model.named_parameters()}`.

    Raises:
        KeyError: a parameter of no known component.
    """
    found: dict[str, Component] = {}
    for name, shape in shapes.items():
        label, active = classify(name, shape, model, system)
        component = found.setdefault(label, Component(label))
        component.total += count(shape)
        for kind, used in active.items():
            component.active[kind] += used
    return sorted(found.values(), key=lambda c: next(i for i, word in enumerate(ORDER) if c.name.startswith(word)))


def classify(name: str, shape: tuple[int, ...], model: Model, system: System) -> tuple[str, dict[str, float]]:
    """Component of a parameter, and per kind how many of its numbers one token uses."""
    parts = name.split(".")
    if "lora" in parts:
        used = classify(name.replace(".lora.", ".").rpartition(".")[0], shape, model, system)[1]
        return "low-rank updates", used
    if parts[0] == "vision":
        return "vision tower", {"vit": float(count(shape))}
    if parts[0] in INPUTS:
        head = model.tied_head and parts[0] == "embed"
        return "embeddings", dict.fromkeys(INPUTS[parts[0]], count(shape) if head else used_by_token(name, shape))
    if parts[0] in LATENTS:
        label = "heads: latents" if parts[0] == "latent_head" else "latents in, flow time"
        return label, {"vae": used_by_token(name, shape)}
    if parts[0] == "text_head":
        return "heads: words", dict.fromkeys(("text", "prompt"), float(count(shape)))
    if parts[0] == "norm":
        return "attention and norms" + _of(parts[1], system.streams), _all(
            shape, kinds_of(system, f"streams.{parts[1]}")
        )
    if parts[2] in ("attention", "moe_norm"):
        return "attention and norms" + _of(parts[3], system.streams), _all(
            shape, kinds_of(system, f"streams.{parts[3]}")
        )
    return _in_moe(parts[3], parts[-1] if len(parts) < 5 else parts[4], shape, model, system)


def _in_moe(
    group: str, name: str, shape: tuple[int, ...], model: Model, system: System
) -> tuple[str, dict[str, float]]:
    if group in ("task_router", "mix"):
        return "task routers and mixes", _all(shape, KINDS)
    if group == "shared" and (name == "dense" or not system.pools):
        return "dense FFN", _all(shape, KINDS if name == "dense" else kinds_of(system, f"shared.{name}"))
    kinds = kinds_of(system, f"{group}.{name}")
    if group == "pools":
        seen = experts_seen(model, system)
        share = {kind: router_of(model, system).top_k / seen[kind] for kind in kinds}
        return f"routed experts {name} ({shape[0]} a layer)", {k: count(shape) * share[k] for k in kinds}
    return ("routers" if group == "routers" else f"shared expert {name}"), _all(shape, kinds)


def _of(stream: str, streams: Mapping[str, object]) -> str:
    return f" of {stream}" if len(streams) > 1 else ""


def _all(shape: tuple[int, ...], kinds: tuple[str, ...]) -> dict[str, float]:
    return dict.fromkeys(kinds, float(count(shape)))


def used_by_token(name: str, shape: tuple[int, ...]) -> float:
    return float(shape[-1] if name.startswith(LOOKUPS) else count(shape))


def count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
