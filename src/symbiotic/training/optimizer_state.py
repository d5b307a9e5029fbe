"""The state of an optimiser by the names of parameters, as sharded runs keep it, and by their numbers, as torch does.

Between the two a run goes from one process to many and back: the numbers depend on the parameter groups, and sharded
parameters have one group a role and mesh, for fused steps take tensors of one mesh only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Named = dict[str, Any]
"""`groups`: of each role its settings and the `names` of its parameters, in the order of a single process; `state`:
field -> name of a parameter -> its value."""


def named(optimizer: Optimizer, names: Mapping[Tensor, str]) -> Named:
    """names: of all parameters, in the order of the model. The tensors are the optimiser's own."""
    number = {name: i for i, name in enumerate(names.values())}
    groups: dict[str, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        mine = groups.setdefault(group["role"], {**settings, "names": []})
        mine["names"] += [names[parameter] for parameter in group["params"]]
        for parameter in group["params"]:
            for field, value in optimizer.state.get(parameter, {}).items():
                state.setdefault(field, {})[names[parameter]] = value
    for group in groups.values():
        group["names"].sort(key=number.__getitem__)
    return {"groups": list(groups.values()), "state": state}


def numbered(found: Named) -> dict[str, Any]:
    """What `Optimizer.state_dict` of a single process gives."""
    groups, number = [], dict[str, int]()
    for group in found["groups"]:
        settings = {key: value for key, value in group.items() if key != "names"}
        start = len(number)
        number.update({name: start + i for i, name in enumerate(group["names"])})
        groups.append({**settings, "params": list(range(start, len(number)))})
    state: dict[int, dict[str, Any]] = {}
    for field, values in found["state"].items():
        for name, value in values.items():
            state.setdefault(number[name], {})[field] = value
    return {"state": state, "param_groups": groups}


def by_name(found: Mapping[str, Any], names: Sequence[Sequence[str]]) -> Named:
    """The inverse of `numbered`. names: of the parameters of each role, in its groups' order."""
    flat = [name for group in names for name in group]
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"names": list(mine)}
        for group, mine in zip(found["param_groups"], names, strict=True)
    ]
    state: dict[str, dict[str, Any]] = {}
    for number, fields in found["state"].items():
        for field, value in fields.items():
            state.setdefault(field, {})[flat[number]] = value
    return {"groups": groups, "state": state}


def restore(optimizer: Optimizer, found: Named, names: Mapping[Tensor, str]) -> None:
    """Give an optimiser a state; its tensors are taken as they are, placed like their parameters."""
    settings = {group["role"]: {k: v for k, v in group.items() if k != "names"} for group in found["groups"]}
    for group in optimizer.param_groups:
        group.update(settings[group["role"]])
        for parameter in group["params"]:
            name = names[parameter]
            fields = {field: values[name] for field, values in found["state"].items() if name in values}
            if fields:
                optimizer.state[parameter] = fields
