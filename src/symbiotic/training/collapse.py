"""When routing counts as collapsed, and when an alarm may act: pure functions of logged numbers.

A place is (layer, kind): the routing of one kind's tokens in one MoE layer. Its evenness compares the capacity rate
with that of total collapse (every token takes the same k experts) and that of uniform random routing for as many
tokens. A plain share of the random rate would mean different things for different layouts: total collapse is .26 of it
for 2 of 8 experts and .06 for 8 of 128. All of this is ours; the rates are `routing_metrics.capacity_rate` and
`random_capacity_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Place = tuple[int, str]

EVEN = 0.9  # a pooled capacity rate above this share of the random one looks healthy


@dataclass(frozen=True)
class Settings:
    """An alarm is raised after `patience` logs in a row with an evenness below `ratio`, and cleared above `clear`."""

    ratio: float = 0.2
    clear: float = 0.35
    patience: int = 5


@dataclass(frozen=True)
class State:
    """What an alarm has to remember; `plain` and `restored` take it to a checkpoint and back."""

    logs: int = 0  # seen so far
    below: dict[Place, int] = field(default_factory=dict)  # logs in a row below `ratio`
    raised: tuple[Place, ...] = ()
    acted: dict[str, int] = field(default_factory=dict)  # target of an action -> `logs` when it was last taken


@dataclass(frozen=True)
class Reading:
    """Capacity rates of one place at one log: measured, of random routing, of total collapse."""

    rate: float
    random: float
    floor: float

    @property
    def evenness(self) -> float:
        """`(rate - floor) / (random - floor)`: 0 at total collapse, 1 for random routing (more where it is more even
        than that), NaN where the two do not differ or a rate is missing."""
        room = self.random - self.floor
        return (self.rate - self.floor) / room if room > 0 else math.nan

    @property
    def share(self) -> float:
        """`rate / random`, NaN without a baseline."""
        return self.rate / self.random if self.random > 0 else math.nan

    def __str__(self) -> str:
        return f"capacity {self.rate:.2f}, {self.random:.2f} expected by chance, {self.floor:.2f} at total collapse"


def collapse_floor(top_k: int, num_experts: int, factor: float = 1.0) -> float:
    """Capacity rate at total collapse, `min(1, cf k/E)`: k experts keep C = cf k N/E assignments each of N."""
    return min(1.0, factor * top_k / num_experts) if num_experts else 1.0


def readings(metrics: Mapping[str, float], metric: str, floors: Mapping[str, float]) -> dict[Place, Reading]:
    """The readings among logged metrics, layer by layer; a kind without tokens has none.

    metric: name of the capacity rate, `capacity@1`. floors: kind -> rate at total collapse, for the kinds to watch.
    """
    found, layer = {}, 0
    while any(name.startswith(f"routing/layer{layer}/") for name in metrics):
        for kind, floor in floors.items():
            rate = metrics.get(f"routing/layer{layer}/{metric}/{kind}")
            if rate is not None:
                random = metrics.get(f"routing/{metric}/{kind}/random", math.nan)
                found[layer, kind] = Reading(rate, random, floor)
        layer += 1
    return found


def behind_pooled(found: Mapping[Place, Reading], pooled: Mapping[int, Reading]) -> dict[Place, float]:
    """Capacity rate, as a share of that of random routing, of the places whose layer looks even when several kinds are
    taken together; 1 for places in a layer that does not look even, which hides nothing.

    Two kinds that use one half of the experts each have .98 together and .50 each (the spec's planted case). pooled:
    layer -> reading of the kinds together.
    """
    looks_even = {layer for layer, reading in pooled.items() if reading.share > EVEN}
    return {place: reading.share if place[0] in looks_even else 1.0 for place, reading in found.items()}


def update(
    state: State, evenness: Mapping[Place, float], settings: Settings
) -> tuple[State, tuple[Place, ...], tuple[Place, ...]]:
    """The state after one more log, and the places that were raised and cleared by it.

    A place that is absent or NaN (no tokens of that kind since the last log) stays as it was.
    """
    below, raised, cleared = dict(state.below), [], []
    for place, value in evenness.items():
        if math.isnan(value):
            continue
        below[place] = below.get(place, 0) + 1 if value < settings.ratio else 0
        if place in state.raised:
            cleared += [place] if value > settings.clear else []
        elif below[place] >= settings.patience:
            raised.append(place)
    kept = tuple(place for place in state.raised if place not in cleared)
    after = replace(state, logs=state.logs + 1, below=below, raised=(*kept, *raised))
    return after, tuple(raised), tuple(cleared)


def names(places: Iterable[Place]) -> str:
    """`vae in layers 0, 2; vit in layer 1`."""
    layers: dict[str, list[str]] = {}
    for layer, kind in sorted(places):
        layers.setdefault(kind, []).append(str(layer))
    return "; ".join(f"{kind} in layer{'s' * (len(n) > 1)} {', '.join(n)}" for kind, n in sorted(layers.items()))


def due(state: State, target: str, cooldown: int) -> bool:
    """May the alarm act on `target`: for the first time, or `cooldown` logs after the last time?"""
    return target not in state.acted or state.logs - state.acted[target] >= cooldown


def acted(state: State, target: str) -> State:
    """The state after an action on `target`."""
    return replace(state, acted={**state.acted, target: state.logs})


def plain(state: State) -> dict[str, Any]:
    return {
        "logs": state.logs,
        "below": dict(state.below),
        "raised": list(state.raised),
        "acted": dict(state.acted),
    }


def restored(values: Mapping[str, Any]) -> State:
    return State(values["logs"], dict(values["below"]), tuple(values["raised"]), dict(values["acted"]))
