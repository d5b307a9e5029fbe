"""An assignment of experts to pools that a file holds: `init.assignment=file`. Standard library only.

The file is JSON: the receipt of a run (its `experts`), or such a list itself: for each layer with experts, a mapping of
pool -> the parent's experts that it stores. Where a system merges experts, neighbours in a list become one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from symbiotic.layout import pool_sizes
from symbiotic.schema import ConfigError, Model, System

KEY = "init.assignment_file"


def read_assignment(path: str | Path, model: Model, system: System) -> list[dict[str, list[int]]]:
    """Per MoE layer: pool -> its experts, in the order of the system's pools.

    Raises:
        ConfigError: no such file, or one that does not give every expert of every layer to one pool, in its size.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "no such file" if not path.is_file() else f"not readable as JSON ({error})"
        raise ConfigError(f"{KEY}={path}: {what}; must be a receipt.json, or a list of pools by layer") from None
    layers = found.get("experts") if isinstance(found, Mapping) else found
    count = model.num_layers - len(model.dense_layers)
    if not isinstance(layers, list) or len(layers) != count:
        has = f"{len(layers)} layers" if isinstance(layers, list) else "no list of layers"
        raise ConfigError(f"{KEY}={path}: {has} in it; must be {count}, the layers with experts")
    sizes = {pool: size * system.merge for pool, size in pool_sizes(model, system).items()}
    return [_layer(layer, sizes, f"{KEY}={path}: layer {i}", system.merge) for i, layer in enumerate(layers)]


def _layer(layer: Any, sizes: Mapping[str, int], where: str, merge: int) -> dict[str, list[int]]:
    if not isinstance(layer, Mapping) or set(layer) != set(sizes):
        has = ", ".join(map(str, layer)) if isinstance(layer, Mapping) else "no mapping"
        raise ConfigError(f"{where}: pools {has}; must be {', '.join(sizes)}")
    for pool, size in sizes.items():
        experts = layer[pool]
        if not isinstance(experts, list) or len(experts) != size:
            has = f"{len(experts)} experts" if isinstance(experts, list) else "no list"
            raise ConfigError(f"{where}: pool {pool}: {has}; must be {size}")
    given = [expert for pool in sizes for expert in layer[pool]]
    total = sum(sizes.values())
    for expert in given:
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < total:
            raise ConfigError(f"{where}: expert {expert!r}; must be a whole number below {total}")
        if given.count(expert) > 1:
            raise ConfigError(f"{where}: expert {expert} has {given.count(expert)} places; must have one")
    return {pool: list(layer[pool]) if merge > 1 else sorted(layer[pool]) for pool in sizes}
