"""What most rules are made of; each raises `ConfigError` with one line: key=value: what is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from symbiotic.schema import Config, ConfigError, near_miss
from symbiotic.training.phases import mix_schedule


def require(ok: bool, key: str, value: Any, right: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={plain(value)}: {right}")


def plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(plain, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def at_least(config: object, prefix: str, lowest: float, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(lowest <= value < float("inf"), f"{prefix}{name}", value, f"must be at least {lowest:g}")


def positive(config: object, prefix: str, names: str) -> None:
    for name in names.split():
        require(0 < getattr(config, name) < float("inf"), f"{prefix}{name}", getattr(config, name), "must be positive")


def share(config: object, prefix: str, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(0 <= value <= 1, f"{prefix}{name}", value, "must lie in [0, 1]")


def known(key: str, words: Iterable[str], known: Iterable[str], what: str) -> None:
    for word in words:
        require(word in set(known), key, word, f"no such {what}; {near_miss(word, known)}")


def check_weights(key: str, weights: Mapping[str, float], drop: Sequence[str], sets: Sequence[str]) -> None:
    """A mix: known sets, none negative, something left of them. `key` is that of the weights."""
    known(key, weights, sets, "set in data.sets")
    for name, weight in weights.items():
        require(0 <= weight < float("inf"), f"{key}.{name}", weight, "must not be negative")
    left = [name for name, weight in weights.items() if weight > 0 and name not in drop]
    without = f" without {', '.join(drop)}" if drop else ""
    require(bool(left), key, dict(weights), f"nothing is left of it{without}; some set must have a weight")


def trained_tasks(config: Config) -> set[str]:
    """`understanding`, `generation`: the tasks that some phase trains on. Of sources their files decide, and shards of
    our own, whose records say it themselves, may hold either; of other data sets the name decides."""
    mixes = [weights for _, weights in mix_schedule(config.phases, config.mix)]
    sets = {name for weights in mixes for name, weight in weights.items() if weight > 0} - set(config.mix.drop)
    sources = config.data.source.get("sources")
    origins = sources if isinstance(sources, Mapping) else {}
    return {task for name in sets for task in _tasks_of(name, origins.get(name))}


def _tasks_of(name: str, origin: Any) -> tuple[str, ...]:
    if not isinstance(origin, Mapping):
        return ("generation" if name.startswith("t2i") else "understanding",)
    form = origin.get("format", "own")
    if form == "own":
        return ("understanding", "generation")
    makes = form == "img2dataset" and str(origin.get("task", "t2i")).startswith("t2i")
    return ("generation" if makes else "understanding",)
