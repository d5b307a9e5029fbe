"""A dead expert becomes a copy of its donor, moments included, and the router can tell the two apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from factory import build
from isolated import in_a_process
from symbiotic.models.moe import MoE
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS, Router
from symbiotic.training.revive import choose_donors, not_revivable, part, pool_loads, revive_experts

MOMENTS = ("exp_avg", "exp_avg_sq")


def layers(model: UnifiedModel) -> list[MoE]:
    return [layer for layer in model.modules() if isinstance(layer, MoE)]


def trained(model: UnifiedModel) -> torch.optim.AdamW:
    """AdamW with moments that are different everywhere."""
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        moments = {name: torch.rand(p.shape, generator=generator) for name in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(5.0), **moments}
    return optimizer


@pytest.mark.parametrize(
    ("load", "share", "expected"),
    [
        ([10, 12, 9, 9], 0.1, {}),
        ([40, 0, 0, 0], 0.1, {1: 0, 2: 0, 3: 0}),
        ([40, 30, 0, 0], 0.1, {2: 0, 3: 1}),  # the second donor is the busiest once the first is shared by two
        ([40, 10, 0, 0], 0.1, {2: 0, 3: 0}),
        ([0, 5, 0, 5], 0.1, {0: 1, 2: 3}),  # the first of equals
        ([97, 1, 1, 1], 0.1, {1: 0, 2: 0, 3: 0}),
        ([97, 3, 0, 0], 0.1, {2: 0, 3: 0}),  # 3 of a mean of 25 is above a tenth
        ([97, 3, 0, 0], 0.2, {1: 0, 2: 0, 3: 0}),
        ([0, 0, 0, 0], 0.1, {}),
    ],
)
def test_who_copies_whom(load: list[float], share: float, expected: dict[int, int]) -> None:
    assert choose_donors(torch.tensor(load, dtype=torch.float32), share) == expected


def test_loads_of_a_pool_are_those_of_its_experts_from_all_kinds() -> None:
    layer = layers(build("symbiotic", gen_fraction=0.25))[0]
    counts = torch.zeros(len(KINDS), 8)
    counts[0, 1], counts[2, 1], counts[3, 7] = 3.0, 4.0, 5.0
    loads = pool_loads(layer, counts)
    assert loads["und"].tolist() == [0, 7, 0, 0, 0, 0]
    assert loads["gen"].tolist() == [0, 5]


def test_rows_columns_and_moments_are_copied_and_nothing_else_changes() -> None:
    model = build("symbiotic")
    optimizer, layer = trained(model), layers(model)[1]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {n: {m: optimizer.state[p][m].clone() for m in MOMENTS} for n, p in model.named_parameters()}
    revive_experts(layer, model.system, "gen", {0: 2, 3: 2}, [optimizer], (0, 7, 1))
    touched = {"blocks.1.moe.pools.gen.w_in": 0, "blocks.1.moe.pools.gen.w_out": 0, "blocks.1.moe.routers.gen": 1}
    for name, parameter in model.named_parameters():
        if name not in touched:
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
            continue
        dim, source = touched[name], torch.tensor([2, 1, 2, 2])
        if dim == 0:
            torch.testing.assert_close(parameter.detach(), before[name][source], rtol=0, atol=0)
        for moment in MOMENTS:
            expected = moments[name][moment].index_select(dim, source)
            torch.testing.assert_close(optimizer.state[parameter][moment], expected, rtol=0, atol=0)
        assert optimizer.state[parameter]["step"] == 5
    router, was = layer.routers["gen"].detach(), before["blocks.1.moe.routers.gen"]
    torch.testing.assert_close(router[:, 1], was[:, 1], rtol=0, atol=0)
    torch.testing.assert_close(router[:, [0, 2, 3]].mean(1), was[:, 2])  # apart, around where the donor was


def test_columns_are_parted_symmetrically_and_across_the_donors_column() -> None:
    router = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    router[:, 3] = router[:, 1]
    w = router[:, 1].clone()
    part(router, {3: 1}, np.random.default_rng(0), spread=0.5)
    d = router[:, 1] - w
    torch.testing.assert_close(router[:, 3], w - d)
    assert float(d.norm() / w.norm()) == pytest.approx(0.5, rel=1e-5)
    assert float(d @ w / w.norm() / d.norm()) == pytest.approx(0.0, abs=1e-5)


def test_the_same_arguments_give_the_same_bits_and_another_seed_others() -> None:
    columns = []
    for seed in ((3, 40, 1), (3, 40, 1), (3, 45, 1), (4, 40, 1), (3, 40, 0)):
        model = build("symbiotic")
        state = torch.random.get_rng_state()
        revive_experts(layers(model)[0], model.system, "und", {1: 0}, [], seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        columns.append(layers(model)[0].routers["und"].detach())
    assert torch.equal(columns[0], columns[1])
    assert all(not torch.equal(columns[0], other) for other in columns[2:])


def test_every_router_of_a_common_pool_and_its_bias_follow() -> None:
    """multi_gate: one pool, a set of columns per modality."""
    model = build("multi_gate", router=Router(top_k=2, bias=True))
    layer = layers(model)[0]
    assert layer.bias is not None
    layer.bias.copy_(torch.arange(len(layer.bias)))
    before = {name: router.detach().clone() for name, router in layer.routers.items()}
    revive_experts(layer, model.system, "all", {5: 6}, [], (0, 0, 0))
    steps, first = [], 0
    for name, router in layer.routers.items():
        torch.testing.assert_close(router[:, [5, 6]].mean(1), before[name][:, 6])
        steps.append(router.detach()[:, 5] - before[name][:, 6])
        assert layer.bias[first + 5] == layer.bias[first + 6] == first + 6
        assert layer.bias[first + 4] == first + 4
        first += router.shape[1]
    assert len(steps) > 1
    assert not torch.equal(steps[0], steps[1])


def test_a_copy_computes_what_its_donor_computes() -> None:
    model = build("symbiotic")
    experts = layers(model)[0].pools["gen"]
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    ends = torch.tensor([4, 8, 8, 8], dtype=torch.int32)
    revive_experts(layers(model)[0], model.system, "gen", {0: 1}, [], (0, 0, 0))
    with torch.no_grad():
        y = experts(torch.cat([x[:4], x[:4]]), ends)
    torch.testing.assert_close(y[:4], y[4:], rtol=0, atol=0)


def test_parameters_that_the_optimiser_holds_in_another_form_are_refused() -> None:
    model = build("symbiotic")
    optimizer = torch.optim.AdamW(model.parameters())
    assert not_revivable(layers(model), [optimizer]) is None
    layer = layers(model)[1]
    layer.pools["gen"].w_out = torch.nn.Parameter(torch.zeros(4, 16, 32))
    assert not_revivable(layers(model), [optimizer]) == "the optimiser holds gen.w_out in another form"


@in_a_process
def test_sharded_parameters_are_refused() -> None:
    model = build("symbiotic")
    layer, mesh = layers(model)[0], init_device_mesh("cpu", (1,))
    layer.pools["und"].w_in = torch.nn.Parameter(distribute_tensor(layer.pools["und"].w_in.data, mesh))
    optimizer = torch.optim.AdamW(model.parameters())
    assert not_revivable([layer], [optimizer]) == "und.w_in is sharded over ranks"
