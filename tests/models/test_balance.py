"""The balance loss in its scopes, reductions and weights, and the bias that balances without a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from factory import build, load_system, random_batch, tiny_model
from symbiotic.models.balance import balance_loss
from symbiotic.models.routing import Columns, RoutingStats, bias_update, route
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import Balance, Router

VISIBLE = torch.tensor([[1, 1, 0, 0]] * 3 + [[0, 0, 1, 1]], dtype=torch.bool)
ROUTERS = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]])


def planted() -> RoutingStats:
    """Two layers, experts 0 and 1 for understanding, 2 and 3 for latents; text leans on 0, latents on 2."""
    counts = torch.tensor([[6.0, 2, 0, 0], [1, 1, 0, 0], [2, 2, 0, 0], [0, 0, 9, 3]])
    probs = torch.tensor([[5.0, 3, 0, 0], [1, 1, 0, 0], [1, 3, 0, 0], [0, 0, 8, 4]])
    return RoutingStats(torch.stack([counts, counts]), torch.stack([probs, probs]), torch.tensor([8.0, 2, 4, 12]))


def test_per_router_and_global_by_hand() -> None:
    stats = planted()
    und = 2 * (9 / 14 * 7 / 14 + 5 / 14 * 7 / 14)
    gen = 2 * (9 / 12 * 8 / 12 + 3 / 12 * 4 / 12)
    assert float(balance_loss(stats, ROUTERS, VISIBLE)) == pytest.approx((und + gen) / 2)
    shares, means = [9, 5, 9, 3], [7, 7, 8, 4]
    together = 4 * sum(f / 26 * p / 26 for f, p in zip(shares, means, strict=True))
    assert float(balance_loss(stats, ROUTERS, VISIBLE, Balance(scope="global"))) == pytest.approx(together)
    summed = balance_loss(stats, ROUTERS, VISIBLE, Balance(reduction="sum"))
    assert float(summed) == pytest.approx(und + gen)  # two layers


def test_a_kind_without_weight_takes_no_part_and_equal_weights_change_nothing() -> None:
    stats = planted()
    without_vit = Balance(kinds={"vit": 0.0})
    und = 2 * (7 / 10 * 6 / 10 + 3 / 10 * 4 / 10) * 10 / 14  # the router counts by the mean weight of its tokens
    gen = 2 * (9 / 12 * 8 / 12 + 3 / 12 * 4 / 12)
    assert float(balance_loss(stats, ROUTERS, VISIBLE, without_vit)) == pytest.approx((und + gen) / 2)
    twice = balance_loss(stats, ROUTERS, VISIBLE, Balance(kinds={"vae": 2.0}))
    whole = 2 * (9 / 14 * 7 / 14 + 5 / 14 * 7 / 14)
    assert float(twice) == pytest.approx((whole + 2 * gen) / 2)  # a kind with a router of its own is heard too
    assert float(balance_loss(stats, ROUTERS, VISIBLE, Balance(kinds={"vae": 0.0}))) == pytest.approx(whole / 2)
    ones = Balance(kinds=dict.fromkeys(("text", "prompt", "vit", "vae"), 1.0))
    assert torch.equal(balance_loss(stats, ROUTERS, VISIBLE, ones), balance_loss(stats, ROUTERS, VISIBLE))
    tiny = Balance(kinds=dict.fromkeys(("text", "prompt", "vit", "vae"), 1e-3))
    expected = 1e-3 * float(balance_loss(stats, ROUTERS, VISIBLE))
    assert float(balance_loss(stats, ROUTERS, VISIBLE, tiny)) == pytest.approx(expected)


def test_one_router_makes_both_scopes_the_same() -> None:
    net, batch = build("standard_moe"), random_batch()
    stats = net(batch).routing
    a, b = (balance_loss(stats, net.routers_RM, net.visible_experts, Balance(scope=s)) for s in ("router", "global"))
    assert torch.equal(a, b)


def test_the_bias_takes_part_in_the_choice_and_not_in_the_gates() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    cfg = Router(top_k=2, normalize=False, bias=True)
    gates, columns, probs = route(logits, None, cfg, torch.tensor([0.0, -1.0, 0.0, 0.5]))
    assert columns.tolist() == [[0, 3]]
    assert torch.equal(gates, probs[:, [0, 3]])
    hidden = torch.tensor([[True, True, True, False]])
    _, columns, _ = route(logits, hidden, cfg, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert 3 not in columns  # however large its bias, an invisible column is not chosen


def test_a_bias_of_zero_changes_no_bit() -> None:
    batch = random_batch()
    plain, biased = build("symbiotic"), build("symbiotic", router=Router(top_k=2, bias=True))
    assert [name for name in biased.state_dict() if name.endswith("moe.bias")]
    a, b = plain(batch), biased(batch)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.prediction, b.prediction)
    assert torch.equal(a.routing.counts, b.routing.counts)


def test_the_update_pushes_towards_the_mean_of_each_router() -> None:
    model = tiny_model(num_experts=4)
    columns = Columns(model, load_system("symbiotic", model))
    counts = torch.zeros(1, 4, 4)
    counts[0, 0] = torch.tensor([6.0, 2, 0, 0])  # text sees experts 0 and 1
    counts[0, 3] = torch.tensor([0.0, 0, 5, 5])  # latents see 2 and 3
    assert bias_update(counts, columns, 0.1).tolist() == [pytest.approx([-0.1, 0.1, 0.0, 0.0])]
    none = bias_update(torch.zeros(1, 4, 4), columns, 0.1)
    assert none.abs().sum() == 0


def test_columns_that_two_routers_share_follow_the_sum() -> None:
    model = tiny_model(num_experts=4)
    system = replace(load_system("symbiotic", model), visible=dict.fromkeys(("text", "prompt", "vit"), ("und",)) | {
        "vae": ("und", "gen")
    })  # fmt: skip
    counts = torch.zeros(1, 4, 4)
    counts[0, 0] = torch.tensor([4.0, 0, 0, 0])  # mean 2: +2 for expert 1, -2 for expert 0
    counts[0, 3] = torch.tensor([0.0, 8, 0, 0])  # mean 2 over four: -6 for expert 1, +2 for the others
    assert bias_update(counts, Columns(model, system), 1.0).tolist() == [[0.0, -1.0, 1.0, 1.0]]


def test_repeated_updates_balance_a_skewed_router() -> None:
    """On fixed tokens: the load of every expert approaches the mean, without touching a weight."""
    model = tiny_model(num_layers=1, router=Router(top_k=2, bias=True))
    net = UnifiedModel(model, load_system("standard_moe", model)).initialise(0)
    with torch.no_grad():
        net.blocks[0].moe.routers["all"][:, :2] += 0.3  # type: ignore[union-attr,index]
    batch, columns = random_batch(30), Columns(model, net.system)

    def worst() -> float:
        load = net(batch).routing.counts.sum((0, 1))
        return float(load.max() / load.mean())

    before = worst()
    for _ in range(300):
        update = bias_update(net(batch).routing.counts, columns, 0.003)
        net.blocks[0].moe.bias += update[0]  # type: ignore[union-attr]
    assert before > 1.5
    assert worst() < 1.15
