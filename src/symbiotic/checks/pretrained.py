"""Whether a run that starts from a pretrained model is that model, and whether its system can be made of it."""

from __future__ import annotations

from symbiotic.checks.rules import plain
from symbiotic.convert.families import OURS, flat, pretrained
from symbiotic.layout import shared_scopes
from symbiotic.schema import Config, ConfigError


def check_pretrained(config: Config) -> None:
    """Raises ConfigError: a number of `model` that is not the file's, or a system that cannot start from it."""
    init, system = config.init, config.system
    if init.checkpoint is not None or init.stage0 is not None:
        other = "checkpoint" if init.checkpoint is not None else "stage0"
        raise ConfigError(f"init.folder={init.folder}: init.{other} is another start; must be null")
    source = pretrained(str(init.folder))
    values = flat(config.model)
    for name, value in source.fields.items():
        if name not in OURS and values[name] != value:
            right = f"must be {plain(value)}, the {source.key(name)} of {source.folder / 'config.json'}"
            raise ConfigError(f"model.{name}={plain(values[name])}: {right}; model=pretrained takes it from there")
    name = source.family.architecture
    if not system.pools:
        raise ConfigError(f"system={system.name}: it has no routed experts, and {name} has nothing else to start from")
    if shared_scopes(system) and not config.model.shared_hidden:
        helps = "ablation=no_shared_ever leaves it out, system=symbiotic_bridge has a bridge of routed experts"
        raise ConfigError(f"system={system.name}: it has a shared expert, and {name} has none to start from; {helps}")
