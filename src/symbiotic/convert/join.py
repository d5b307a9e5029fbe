"""The pools of a split model put back into one, in the order of the parent's experts: the split the other way round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from symbiotic.convert.split import Assignment, parent_name
from symbiotic.layout import opened, router_pools, shared_scopes
from symbiotic.schema import PARENT, RunError, System


def check_joinable(system: System) -> None:
    """Raises RunError where a child of this system is not the parent's model with masks."""
    if not system.pools or opened(system) is None:
        what = "merged experts, gates of its own or several routers for a pool" if system.pools else "no routed experts"
        raise RunError(f"system={system.name}: it has {what}: with its masks off it is no model of one pool")
    for what, copies in (("shared expert", shared_scopes(system)), ("attention and the norms", system.streams)):
        if len(copies) > 1:
            names = " and ".join(copies)
            raise RunError(f"system={system.name}: it has the {what} twice, for {names}; an exported model has one")


def joined(
    child: Mapping[str, Tensor], names: Mapping[str, torch.Size], system: System, assignment: Assignment
) -> dict[str, Tensor]:
    """The parent's state: experts, router columns and biases at the numbers that they had there.

    names: the parent's parameters that are wanted, with their shapes. assignment: of the receipt, per MoE layer.

    Raises:
        RunError: see `check_joinable`; or the child lacks a parameter.
    """
    check_joinable(system)
    pools, state = router_pools(system), {}
    layers = sorted({int(name.split(".")[1]) for name in names if ".moe.routers." in name})
    experts = dict(zip(layers, assignment, strict=True))
    copies = {parent_name(name, system): name for name in child}
    for name, shape in names.items():
        if ".moe.pools." in name or ".moe.routers." in name or name.endswith(".moe.bias"):
            state[name] = _joined(name, shape, child, pools, experts[int(name.split(".")[1])])
        elif name in copies:
            state[name] = child[copies[name]]
        else:
            raise RunError(f"no parameter {name!r} in the weights; it is not a model of system={system.name}")
    return state


def _joined(
    name: str,
    shape: torch.Size,
    child: Mapping[str, Tensor],
    pools: Mapping[str, str],
    experts: Mapping[str, list[int]],
) -> Tensor:
    """Rows of a stacked expert weight, columns of the router, or biases, each from where it is stored."""
    if name.endswith(".bias"):
        order = [expert for pool in pools.values() for expert in experts[pool]]
        return torch.empty(shape).index_copy(0, torch.tensor(order), child[name].cpu())
    group = "pools" if ".moe.pools." in name else "routers"
    whole = torch.empty(shape)
    for owner in experts if group == "pools" else pools:
        part = child[name.replace(f".{group}.{PARENT}", f".{group}.{owner}")]
        index = torch.tensor(experts[owner if group == "pools" else pools[owner]])
        whole.index_copy_(0 if group == "pools" else 1, index, part.to(whole))
    return whole
