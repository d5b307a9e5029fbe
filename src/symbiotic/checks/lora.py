"""Whether the low-rank updates of a config have weights that they update.

Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import replace

from symbiotic.checks.rules import at_least, positive, require
from symbiotic.layout import adapted, parameter_names
from symbiotic.schema import Config, ConfigError, near_miss


def check_lora(config: Config) -> None:
    """Raises ConfigError."""
    lora = config.lora
    at_least(lora, "lora.", 0, "rank")
    positive(lora, "lora.", "alpha")
    if not lora.rank:
        counted_on = {"lora" in phase.frozen for phase in config.phases.list} == {True, False}
        right = "a phase trains the low-rank updates that another freezes; must be positive, as lora=r16 has it"
        require(not counted_on, "lora.rank", lora.rank, right)
        return
    require(bool(lora.targets), "lora.targets", lora.targets, "must name weights, as lora=r16 does")
    for target in lora.targets:
        try:
            re.compile(target)
        except re.error as error:
            raise ConfigError(f"lora.targets={target}: no regular expression: {error}") from None
    if not adapted(parameter_names(config.model, config.system), lora):
        raise ConfigError(f"lora.targets: {unmatched(config)}")


def unmatched(config: Config) -> str | None:
    """Which target matches no weight that can be updated, and what is near; None where each does.

    Targets that come with an option may match nothing in some system; those that were set on purpose may not.
    """
    names = parameter_names(config.model, config.system)
    for target in config.lora.targets:
        if not adapted(names, replace(config.lora, targets=(target,))):
            kinds = {
                re.sub(r"^blocks\.\d+\.", "", name) for name in adapted(names, replace(config.lora, targets=("",)))
            }
            what = "is no weight that can be updated" if any(re.search(target, n) for n in names) else "is no weight"
            return f"{target!r} {what} of system={config.system.name}; {near_miss(target, kinds)}"
    return None
