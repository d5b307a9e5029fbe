"""What in a config follows from other keys of it: the ends and shields of phases, the sizes of pools.

A run keeps values only. What its dials give at a place is put back here as the reference to the dial, so that runs
whose dials differ do not differ in what follows from them too, and differ where anything else was changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from symbiotic.config import resolved

Config = Mapping[str, Any]


def phase_list(config: Config) -> list[Any]:
    """With the references that its values allow."""
    phases = config["phases"]
    ends = {phases[dial]: f"${{phases.{dial}}}" for dial in ("stage1_steps", "steps", "shield_steps") if dial in phases}
    shields = {round(1.0 - phases["release_scale"], 12): "${complement:${phases.release_scale}}"}
    dials = {"until": ends, "shield": shields}
    return [{key: dials[key].get(v, v) if key in dials else v for key, v in p.items()} for p in phases["list"]]


def pool_sizes(config: Config) -> dict[str, Any]:
    dials = {config["model"]["gen_fraction"]: "${model.gen_fraction}"}
    return {name: dials.get(size, size) for name, size in config["system"]["pools"].items()}


PLACES: dict[tuple[str, str], Callable[[Config], Any]] = {
    ("phases", "list"): phase_list,
    ("system", "pools"): pool_sizes,
}


def as_written(configs: Mapping[Path, Config]) -> dict[Path, dict[str, Any]]:
    """`plain` configs by run, with references. Each place is written as in most runs whose dials give its values: a
    phase that has no step in one run (so that it is not listed) is then the same in all."""
    found = {path: dict(config) for path, config in configs.items()}
    for (group, key), refer in PLACES.items():
        known = {json.dumps(refer(config)): refer(config) for config in configs.values()}
        fits = {text: [p for p, c in configs.items() if gives(c, group, key, one)] for text, one in known.items()}
        for text in sorted(known, key=lambda one: len(fits[one])):  # the last, of most runs, stays
            for path in fits[text]:
                found[path][group] = {**found[path][group], key: known[text]}
    return found


def gives(config: Config, group: str, key: str, written: Any) -> bool:
    """Whether this, with the dials of a config, is what the config holds (in its order, too)."""
    dials = {name: config[name] for name in ("phases", "model", "system")}
    made = resolved({**dials, group: {**config[group], key: written}})[group][key]
    return json.dumps(made) == json.dumps(config[group][key])
