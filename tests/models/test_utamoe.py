"""The task-aware MoE layer against its formulas (UTAMoE, arXiv 2506.03591): groups, gates, mix, loss and balance."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from factory import build, load_system, random_batch, tiny_model
from symbiotic.callbacks.self_checks import recount_balance
from symbiotic.layout import groups
from symbiotic.models.balance import balance_loss
from symbiotic.models.moe import MoE
from symbiotic.models.places import Places
from symbiotic.models.routing import Columns, RoutingStats, bias_update
from symbiotic.models.transformer import initial
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised
from symbiotic.objectives.total import loss_terms
from symbiotic.schema import KINDS, Balance, Objective

TRUTH, PREDICTION = torch.tensor(True), torch.tensor(False)
GROUP = {"text": "und", "vit": "und", "prompt": "gen", "vae": "gen"}


def layer(**changes: Any) -> MoE:
    model = tiny_model()
    made = MoE(model, load_system("utamoe", model, **changes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial(f"blocks.0.moe.{name}", parameter, 0, 0.3, 1))
    return made


def by_hand(moe: MoE, x_D: torch.Tensor, kind: str, alpha: float, scale: float) -> torch.Tensor:
    """`scale (alpha E(x) + (1 - alpha) S(x))`, E the best expert of the group of the token's kind."""

    def ffn(w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
        gate, up = (x_D @ w_in).chunk(2)
        return (gate / (1 + torch.exp(-gate)) * up) @ w_out

    pool: Any = moe.pools[GROUP[kind]]
    best = int((x_D @ moe.routers[GROUP[kind]]).argmax())
    routed, shared = ffn(pool.w_in[best], pool.w_out[best]), ffn(moe.shared["all"].w_in, moe.shared["all"].w_out)
    return scale * (alpha * routed + (1 - alpha) * shared)


@pytest.mark.parametrize(("scale", "mix"), [(2.0, 0.0), (1.0, 0.0), (2.0, 0.7)])
def test_with_the_truth_the_layer_is_the_reference(scale: float, mix: float) -> None:
    moe, batch = layer(alpha_scale=scale), random_batch()
    moe.mix.data.fill_(mix)  # type: ignore[union-attr]
    x_ND = torch.randn(batch.kind.numel(), 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, _ = moe(x_ND, Places(batch, None, by_truth=TRUTH))
        alpha = float(torch.sigmoid(torch.tensor(mix)))
        for n in Places(batch, None).valid_N.nonzero().flatten().tolist():
            kind = KINDS[int(batch.kind.flatten()[n])]
            torch.testing.assert_close(found[n], by_hand(moe, x_ND[n], kind, alpha, scale), rtol=1e-4, atol=1e-5)


def test_the_start_is_the_sum_of_routed_and_shared_experts_bit_for_bit() -> None:
    mixed, summed = layer(), layer(alpha_scale=None)
    summed.load_state_dict(mixed.state_dict(), strict=False)
    batch = random_batch()
    x_ND = torch.randn(batch.kind.numel(), 32)
    a, b = (moe(x_ND, Places(batch, None))[0] for moe in (mixed, summed))
    assert torch.equal(a, b)


def test_tokens_go_where_the_task_router_says_and_by_the_truth_where_their_kind_belongs() -> None:
    moe, batch = layer(), random_batch()
    task: Any = moe.task_router
    task.weight.data.zero_()
    task.bias.data.copy_(torch.tensor([0.0, 5.0]))  # everything is generation
    x_ND = torch.randn(batch.kind.numel(), 32)
    counts = {}
    for name, flag in (("none", None), ("predicted", PREDICTION), ("truth", TRUTH)):
        stats = moe(x_ND, Places(batch, None, by_truth=flag))[1]
        counts[name] = stats.counts_ME
        assert stats.task.predicted_MR[:, 0].sum() == 0
    tokens_M = Places(batch, None).tokens_M
    assert torch.equal(counts["none"], counts["predicted"])
    assert torch.equal(counts["predicted"][:, 2:].sum(1), tokens_M)
    assert torch.equal(counts["truth"][:, :2].sum(1), tokens_M * torch.tensor([1.0, 0, 1, 0]))
    assert torch.equal(counts["truth"][:, 2:].sum(1), tokens_M * torch.tensor([0.0, 1, 0, 1]))


def test_loss_and_prediction_of_the_task_router_by_hand() -> None:
    """Its logits are the first two numbers of a token, planted by its kind."""
    moe, batch = layer(), random_batch()
    task: Any = moe.task_router
    task.weight.data.copy_(torch.eye(2, 32))
    task.bias.data.zero_()
    planted = torch.tensor([[3.0, 1.0], [2.0, 1.0], [0.0, 4.0], [0.0, 1.0]])  # right, wrong, wrong, right
    kind_N, valid_N = batch.kind.flatten(), batch.segment.flatten() >= 0
    x_ND = torch.zeros(len(kind_N), 32)
    x_ND[:, :2] = planted[kind_N]
    found = task(x_ND, Places(batch, None))[1]
    truth_N = torch.tensor([0, 1, 0, 1])[kind_N]
    expected = sum(-planted[k].log_softmax(0)[t] for k, t in zip(kind_N[valid_N], truth_N[valid_N], strict=True))
    torch.testing.assert_close(found.loss, expected / valid_N.sum())
    tokens_M = Places(batch, None).tokens_M
    assert torch.equal(found.predicted_MR.argmax(1), torch.tensor([0, 0, 1, 1]))
    assert torch.equal(found.predicted_MR.sum(1), tokens_M)
    assert torch.equal(found.predicted_MR, found.sent_MR)
    forced = task(x_ND, Places(batch, None, by_truth=TRUTH))[1]
    assert torch.equal(forced.predicted_MR, found.predicted_MR)
    assert torch.equal(forced.sent_MR.argmax(1), torch.tensor([0, 1, 0, 1]))


def test_a_lone_gate_teaches_its_router_only_straight_through() -> None:
    batch = random_batch()
    x_ND, outputs, norms = torch.randn(batch.kind.numel(), 32), [], []
    for gate in ("straight_through", "router", "probability"):
        moe = layer(gate=gate)
        y_ND, _ = moe(x_ND, Places(batch, None, by_truth=TRUTH))
        y_ND.square().sum().backward()
        outputs.append(y_ND.detach())
        norms.append(float(moe.routers["und"].grad.norm()))  # type: ignore[union-attr]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert norms[0] > 1e-3
    assert norms[1] < 1e-6 * norms[0]  # p / p has no gradient but rounding
    assert norms[2] > 1e-3


def planted() -> RoutingStats:
    """One layer, experts 0, 1 of und and 2, 3 of gen; two of eight words and one of four latents were sent wrong."""
    counts = torch.tensor([[4.0, 2, 1, 1], [0, 0, 3, 1], [1, 1, 0, 0], [0, 1, 2, 1]])
    probs = torch.tensor([[3.0, 3, 1, 1], [0, 0, 2, 2], [1, 1, 0, 0], [0.5, 0.5, 2, 1]])
    sent = torch.tensor([[6.0, 2], [0, 4], [2, 0], [1, 3]])
    tokens = torch.tensor([8.0, 4, 2, 4])
    return RoutingStats(counts[None], probs[None], tokens, sent[None], sent[None])


@pytest.mark.parametrize("kinds", [{}, {"text": 0.5, "vae": 2.0}])
def test_balance_is_per_group_over_the_tokens_that_were_sent_to_it(kinds: dict[str, float]) -> None:
    model = tiny_model()
    system, stats, cfg = load_system("utamoe", model), planted(), Balance(kinds=kinds)
    columns = Columns(model, system)
    w = [kinds.get(kind, 1.0) for kind in KINDS]
    groups_by_hand = []
    for experts, group in ((slice(0, 2), 0), (slice(2, 4), 1)):
        counts, probs = (sum(w[m] * t[0, m, experts] for m in range(4)) for t in (stats.counts, stats.probs))
        assert stats.sent is not None
        tokens, everyone = sum(w[m] * stats.sent[0, m, group] for m in range(4)), stats.sent[0, :, group].sum()
        groups_by_hand.append(2 * (counts / counts.sum() * probs / tokens).sum() * tokens / everyone)
    expected = float(sum(groups_by_hand)) / 2
    found = balance_loss(stats, columns.routers_RM, columns.visible_ME, cfg)
    assert float(found) == pytest.approx(expected)
    assert recount_balance(stats, model, system, cfg) == pytest.approx(expected)
    together = Balance(scope="global", kinds=kinds)
    assert float(balance_loss(stats, columns.routers_RM, columns.visible_ME, together)) == pytest.approx(
        recount_balance(stats, model, system, together)
    )


def test_the_balance_bias_counts_the_tokens_that_were_sent() -> None:
    model = tiny_model()
    columns = Columns(model, load_system("utamoe", model))
    counts = torch.zeros(1, 4, 4)
    counts[0, 3] = torch.tensor([5.0, 1, 2, 2])  # latents that were sent to understanding press expert 0
    assert bias_update(counts, columns, 0.1).tolist() == [pytest.approx([-0.1, 0.1, 0.0, 0.0])]


def test_tables_and_the_loss_term() -> None:
    net, plain = build("utamoe"), build("symbiotic")
    assert groups(net.system) == (("und",), ("gen",))
    assert bool(net.visible_experts.all())
    assert net.own_experts.tolist() == [[True, True, False, False], [False, False, True, True]] * 2
    assert net.groups_RE is not None
    assert net.groups_RE.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert plain.groups_RE is None
    assert torch.equal(plain.own_experts, plain.visible_experts)
    batch = random_batch()
    for model, has in ((net, True), (plain, False)):
        terms = loss_terms(model, model(noised(batch)), batch, Objective())
        assert ("task" in terms) == has
    terms["balance"].backward()
    out = net(noised(batch))
    assert out.task is not None
    out.task.backward()
    grads = {name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {f"blocks.{i}.moe.task_router.{leaf}" for i in range(3) for leaf in ("weight", "bias")} <= grads


def test_a_dense_layer_has_neither_task_router_nor_mix() -> None:
    model = tiny_model(dense_layers=(0,), dense_hidden=40)
    net = UnifiedModel(model, load_system("utamoe", model)).initialise(0)
    names = [name for name, _ in net.named_parameters() if "task_router" in name or name.endswith("mix")]
    assert {name.split(".")[1] for name in names} == {"1", "2"}
    assert net(noised(random_batch())).routing.sent.shape == (2, 4, 2)  # type: ignore[union-attr]


def test_lookup_equals_a_task_router_that_is_right() -> None:
    """The same weights with the task router off: tokens go by their kind."""
    net, batch = build("utamoe"), noised(random_batch())
    lookup = UnifiedModel(net.cfg, dataclasses.replace(net.system, task_router=False))
    lookup.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        a, b = net(batch, by_truth=TRUTH), lookup(batch)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.routing.counts, b.routing.counts)
    assert not F.mse_loss(net(batch).logits, b.logits).isclose(torch.zeros(()))
