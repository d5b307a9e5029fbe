"""Learning-rate roles: every parameter in exactly one, by regular expressions on its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from symbiotic.schema import ConfigError


def assign_roles(names: Iterable[str], roles: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Parameter name -> role.

    Raises:
        ConfigError: a parameter matches no role, or more than one; the message names it.
    """
    compiled = {role: [re.compile(p) for p in patterns] for role, patterns in roles.items()}
    assigned = {}
    for name in names:
        hits = [role for role, patterns in compiled.items() if any(p.search(name) for p in patterns)]
        if len(hits) != 1:
            found = f"matches the roles {', '.join(hits)}" if hits else "is covered by no role"
            raise ConfigError(f"rates.roles: parameter {name!r} {found}; every parameter needs exactly one")
        assigned[name] = hits[0]
    return assigned


def role_lr(role: str, lr: float, by_role: Mapping[str, float | None]) -> float:
    """The base learning rate of a role: its own, or `lr` where it has none."""
    own = by_role.get(role)
    return lr if own is None else own
