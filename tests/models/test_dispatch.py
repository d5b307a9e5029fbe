"""Tokens are cut into pools by what kinds tell, where they tell it: no layer then waits for its router's choice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call

from factory import SYSTEMS, build, random_batch
from symbiotic.layout import kinds_by_pool
from symbiotic.models.moe import MoE
from symbiotic.models.places import Places

TOLD = {
    "symbiotic": {"und": ("text", "prompt", "vit"), "gen": ("vae",)},
    "tripartite": {"text": ("text", "prompt"), "vit": ("vit",), "vae": ("vae",)},
    "multi_gate": {"all": ("text", "prompt", "vit", "vae")},
    "symbiotic_bridge": None,
    "utamoe": None,
}
"""Pools of a system, and who comes there; None where a token of some kind may go to either."""


def layer_of(name: str) -> MoE:
    return next(module for module in build(name).modules() if isinstance(module, MoE) and module.pools)


def inputs(rows: int = 9) -> tuple[Tensor, Places]:
    places = Places(random_batch(rows), torch.tensor(1.0))
    assert not places.valid_N.all()  # there is padding
    return torch.randn(len(places.valid_N), build("symbiotic").cfg.width), places


@pytest.mark.parametrize("name", TOLD)
def test_kinds_tell_whose_pool_they_come_to(name: str) -> None:
    assert kinds_by_pool(build(name).system) == TOLD[name]


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "dense"])
def test_what_kinds_tell_is_what_the_routers_chose(name: str) -> None:
    layer, (x_ND, places) = layer_of(name), inputs()
    asking = copy.deepcopy(layer)
    asking.kinds_by_pool = None
    seen: list[list[int]] = []

    def kept(ends_E: Tensor, places: Places, of: MoE = layer) -> list[int]:
        seen.append(MoE.rows_of_pools(of, ends_E, places))
        return seen[-1]

    layer.rows_of_pools = kept  # type: ignore[method-assign]
    asking.rows_of_pools = lambda ends_E, places: kept(ends_E, places, asking)  # type: ignore[method-assign]
    one, other = layer(x_ND, places)[0], asking(x_ND, places)[0]
    assert torch.equal(one, other)
    assert seen[0] == seen[1]
    assert sum(seen[0]) == int(places.valid_N.sum()) * layer.cfg.top_k


def test_a_logit_that_is_not_finite_leaves_no_pool_with_rows_of_another() -> None:
    layer, (x_ND, places) = layer_of("symbiotic"), inputs()
    ends: list[tuple[int, int]] = []
    for pool in layer.pools.values():
        pool.register_forward_pre_hook(lambda _, args: ends.append((int(args[1].max()), len(args[0]))))
    x_ND[0] = float("nan")
    layer(x_ND, places)
    assert all(last <= rows for last, rows in ends)


@pytest.mark.parametrize(("name", "waits"), [("symbiotic", False), ("mot", False), ("standard_moe", False),
                                             ("utamoe", True)])  # fmt: skip
def test_a_layer_asks_the_device_for_nothing(name: str, waits: bool) -> None:
    """Tensors without numbers: whatever asks for one fails. Tokens by kind, and where they stand, were asked for
    before; the way back is in it."""
    layer, (x_ND, places) = layer_of(name), inputs()
    layer(x_ND, places)  # fills what is looked up once a forward
    places.count(("text",))
    mode = FakeTensorMode()
    for key, value in vars(places).items():
        if isinstance(value, Tensor):
            setattr(places, key, mode.from_tensor(value))
    places._index = {key: mode.from_tensor(value) for key, value in places._index.items()}
    state = {
        key: mode.from_tensor(value)
        for key, value in {**dict(layer.named_parameters()), **dict(layer.named_buffers())}.items()
    }
    with mode:
        x_ND = torch.randn(x_ND.shape, requires_grad=True)
        if waits:
            with pytest.raises(DataDependentOutputException):
                functional_call(layer, state, (x_ND, places))
            return
        functional_call(layer, state, (x_ND, places))[0].sum().backward()
    assert x_ND.grad is not None
    assert x_ND.grad.shape == x_ND.shape
